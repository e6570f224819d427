"""Export to PEFT: complete or refused, loadable by stock PEFT where PEFT has the method, atomic."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor

import malora_dist.hf.export as export
from malora_dist.errors import CheckpointError
from malora_dist.hf.export import write_peft_adapter
from malora_dist.hf.keys import TensorKey
from malora_dist.methods import maths
from malora_dist.methods.spec import AdapterSpec
from tests.hf_models import inputs, logits, tiny_llama

WIDTHS = {"q_proj": (32, 32), "v_proj": (32, 16), "down_proj": (48, 32)}
METHODS = ("lora", "asymmetric_lora", "molora", "malora")


def spec_of(method: str) -> AdapterSpec:
    return AdapterSpec(
        method=method,
        target_modules=["v_proj", "linear_fc2", "q_proj"],
        lora_rank=4,
        lora_alpha=6.0,
        use_rslora=True,
        num_lora_experts=4,
        shared_dim=6,
    )


def tensors_of(spec: AdapterSpec) -> dict[TensorKey, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        (layer, projection, name): 0.3 * torch.randn(spec.parameter_shape(name, *widths), generator=generator)
        for layer in (0, 1)
        for projection, widths in WIDTHS.items()
        for name in spec.parameter_names
    }


def write(directory: Path, method: str = "malora", tensors: dict[TensorKey, Tensor] | None = None) -> None:
    spec = spec_of(method)
    write_peft_adapter(directory, spec, tensors_of(spec) if tensors is None else tensors, "some/base", "f00d")


@pytest.mark.parametrize("method", METHODS)
def test_export_computes_what_the_spec_says(method: str, tmp_path: Path) -> None:
    write(tmp_path / "out", method)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")
    spec, tensors = spec_of(method), tensors_of(spec_of(method))
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(4))
    params = {name: tensors[1, "down_proj", name] for name in spec.parameter_names}
    delta, _ = maths.adapter_forward(spec, params, x)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + delta)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(WIDTHS)
    assert (config["base_model_name_or_path"], config["task_type"]) == ("some/base", "CAUSAL_LM")
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["base_fingerprint"] == "f00d"


def test_stock_peft_loads_lora_without_this_package_and_without_a_warning(tmp_path: Path) -> None:
    write(tmp_path / "out", "lora")
    expected = logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "out"))
    tiny_llama().save_pretrained(tmp_path / "base")
    torch.save(inputs(), tmp_path / "inputs.pt")
    code = f"""
import sys, torch
from peft import PeftModel
from transformers import LlamaForCausalLM
base = LlamaForCausalLM.from_pretrained({str(tmp_path / "base")!r})
model = PeftModel.from_pretrained(base, {str(tmp_path / "out")!r})
with torch.no_grad():
    torch.save(model.eval()(**torch.load({str(tmp_path / "inputs.pt")!r})).logits, {str(tmp_path / "logits.pt")!r})
assert "malora_dist" not in sys.modules
"""
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop((1, "q_proj", "B")), r"1 missing: layers\.1\.q_proj\.B"),
        (lambda t: t.update({(0, "k_proj", "B"): torch.ones(1)}), r"1 unexpected: layers\.0\.k_proj\.B"),
        (lambda t: t.update({(2, "q_proj", "B"): t[0, "q_proj", "B"]}), r"missing: layers\.2\.down_proj\.A|P, layers"),
        (lambda t: t.update({(0, "v_proj", "B"): t[0, "v_proj", "B"][..., :1]}), r"1 of another shape: .*0\.v_proj\.B"),
        (lambda t: t.clear(), r"\d missing"),
    ],
)
def test_incomplete_adapters_are_refused_and_nothing_is_written(
    method: str, damage: Callable[[dict[TensorKey, Tensor]], None], message: str, tmp_path: Path
) -> None:
    tensors = tensors_of(spec_of(method))
    damage(tensors)
    with pytest.raises(CheckpointError, match=message):
        write(tmp_path / "out", method, tensors)
    assert not list(tmp_path.iterdir())


def test_shared_memory_is_written_out(tmp_path: Path) -> None:
    """fuse_projections gives q, k and v the same S_A: safetensors refuses tensors that share memory."""
    tensors = tensors_of(spec_of("malora"))
    tensors[0, "q_proj", "S"] = tensors[0, "v_proj", "S"]
    write(tmp_path / "out", tensors=tensors)
    PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")


def test_overwrites_only_an_earlier_export(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "lora")
    write(out, "malora")
    assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == "MALORA"
    (out / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"notes\.txt"):
        write(out)
    assert (out / "notes.txt").read_text() == "mine"
    with pytest.raises(CheckpointError, match="not a directory"):
        write(out / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_write_leaves_the_earlier_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    write(out, "lora")
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(export, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        write(out, "malora")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_readable_by_whom_the_umask_allows(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    write(tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode
