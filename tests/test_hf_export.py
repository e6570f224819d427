"""Export to PEFT: complete or refused, loadable by stock PEFT where PEFT has the method, atomic."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import malora_dist.hf.export as export
from malora_dist.errors import CheckpointError
from malora_dist.hf.export import write_peft_adapter
from malora_dist.hf.keys import TensorKey
from malora_dist.hf.read import read_peft_adapter
from malora_dist.methods.reference import adapted_forward
from malora_dist.methods.spec import AdapterSpec
from tests.hf_models import PARAMETERS, STOCK, formula, inputs, logits, tiny_llama

WIDTHS = {"q_proj": (32, 32), "v_proj": (32, 16), "down_proj": (48, 32)}
TARGETS = ["v_proj", "linear_fc2", "q_proj"]


def spec_of(method: str, **changes: float) -> AdapterSpec:
    fields = {"lora_rank": 4, "lora_alpha": 6.0, "use_rslora": True, "num_lora_experts": 4, "shared_dim": 8}
    return AdapterSpec(method=method, target_modules=TARGETS, **fields | changes)


def tensors_of(spec: AdapterSpec) -> dict[TensorKey, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        (layer, projection, name): 0.3 * torch.randn(spec.declared.shape(name, *widths), generator=generator)
        for layer in (0, 1)
        for projection, widths in WIDTHS.items()
        for name in PARAMETERS[spec.method]
    }


def write(
    directory: Path, method: str = "malora", tensors: dict[TensorKey, Tensor] | None = None, **changes: float
) -> None:
    spec = spec_of(method, **changes)
    write_peft_adapter(directory, spec, tensors_of(spec) if tensors is None else tensors, "some/base", "f00d")


@pytest.mark.parametrize("method", PARAMETERS)
def test_export_computes_what_the_spec_says(method: str, tmp_path: Path) -> None:
    write(tmp_path / "out", method)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")
    spec, tensors = spec_of(method), tensors_of(spec_of(method))
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(4))
    params = {name: tensors[1, "down_proj", name] for name in PARAMETERS[method]}
    torch.testing.assert_close(layer(x), formula(spec, params, x, layer.base_layer.weight)[0], rtol=1e-4, atol=1e-5)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(WIDTHS)
    assert (config["base_model_name_or_path"], config["task_type"]) == ("some/base", "CAUSAL_LM")
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["base_fingerprint"] == "f00d"


@pytest.mark.parametrize("method", STOCK)
def test_stock_peft_has_our_maths_and_gradients(method: str, tmp_path: Path) -> None:
    """PEFT's layer, the one-process reference of every layout, and the formula: all three the same."""
    write(tmp_path / "out", method)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out", is_trainable=True)
    layer = model.get_base_model().model.layers[1].self_attn.v_proj.train()
    spec, weight = spec_of(method), layer.base_layer.weight.detach()
    x_TI = torch.randn(5, 32, generator=torch.Generator().manual_seed(4))
    dy_TO = torch.randn(5, 16, generator=torch.Generator().manual_seed(5))
    theirs = {"A": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight}
    if method == "dora":
        theirs["magnitude"] = layer.lora_magnitude_vector["default"].weight

    def results(forward: Callable[[Tensor], Tensor], params: dict[str, Tensor]) -> tuple[Tensor, ...]:
        x = x_TI.clone().requires_grad_()
        y = forward(x)
        return y, *torch.autograd.grad(y, [x, *params.values()], dy_TO)

    ours = {k: tensors_of(spec)[1, "v_proj", k].requires_grad_() for k in STOCK[method]}
    stock = results(layer, theirs)
    reference = results(lambda x: adapted_forward(spec.declared, ours, x, weight)[0], ours)
    written = results(lambda x: formula(spec, ours, x, weight)[0], ours)
    for a, b, c in zip(stock, reference, written, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(b, c, rtol=1e-4, atol=1e-5)


def test_with_dropout_stock_dora_scales_what_the_base_makes_of_the_dropped_input(tmp_path: Path) -> None:
    """PEFT: W0 x + (c - 1) W0 x' + c s B A x', c = magnitude / norm and x' the dropped x. Here: c (W0 x + s B A x')."""
    write(tmp_path / "out", "dora", lora_dropout=0.5)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")
    layer = model.get_base_model().model.layers[1].self_attn.v_proj.train()
    spec, weight = spec_of("dora"), layer.base_layer.weight
    params = {k: tensors_of(spec)[1, "v_proj", k] for k in STOCK["dora"]}
    x_TI = torch.randn(5, 32, generator=torch.Generator().manual_seed(4))
    torch.manual_seed(6)
    stock = layer(x_TI)
    torch.manual_seed(6)
    dropped_x_TI = torch.nn.functional.dropout(x_TI, 0.5)
    low_rank = spec.declared.scaling * params["B"] @ params["A"]
    c_O = params["magnitude"] / (weight + low_rank).norm(dim=1)
    on_base, on_dropped, added = x_TI @ weight.t(), dropped_x_TI @ weight.t(), dropped_x_TI @ low_rank.t()
    torch.testing.assert_close(stock, on_base + (c_O - 1) * on_dropped + c_O * added, rtol=1e-4, atol=1e-5)
    ours, _ = adapted_forward(spec.declared, params, x_TI, weight, dropped_x_TI=dropped_x_TI)
    torch.testing.assert_close(ours, c_O * (on_base + added), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_our_files_have_stock_peft_s_keys_and_are_read_like_its_own(method: str, tmp_path: Path) -> None:
    spec, tensors = spec_of(method), tensors_of(spec_of(method))
    write(tmp_path / "ours", method)
    config = LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, use_dora=method == "dora", target_modules=sorted(spec.projections)
    )
    model = get_peft_model(tiny_llama(), config)
    for (layer, projection, name), tensor in tensors.items():
        block = "mlp" if projection == "down_proj" else "self_attn"
        linear = model.get_submodule(f"base_model.model.model.layers.{layer}.{block}.{projection}")
        kind = {"A": "lora_A", "B": "lora_B", "magnitude": "lora_magnitude_vector"}[name]
        getattr(linear, kind)["default"].weight.data.copy_(tensor)
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    for side in ("ours", "theirs"):
        adapter = read_peft_adapter(tmp_path / side)
        assert adapter.spec.identity() == spec.identity()
        assert adapter.tensors.keys() == tensors.keys()
        assert all(torch.equal(adapter.tensors[key], tensors[key]) for key in tensors)


def test_stock_peft_loads_its_methods_without_this_package_and_without_a_warning(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    torch.save(inputs(), tmp_path / "inputs.pt")
    expected = {}
    for method in ("lora", "dora"):
        write(tmp_path / method, method)
        expected[method] = logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / method))
    code = f"""
import sys, torch
from pathlib import Path
from peft import PeftModel
from transformers import LlamaForCausalLM
folder = Path({str(tmp_path)!r})
with torch.no_grad():
    for method in {[*expected]}:
        model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder / "base"), folder / method)
        torch.save(model.eval()(**torch.load(folder / "inputs.pt")).logits, folder / f"{{method}}.pt")
assert "malora_dist" not in sys.modules
"""
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    for method, found in expected.items():
        assert torch.equal(torch.load(tmp_path / f"{method}.pt"), found)


@pytest.mark.parametrize("method", PARAMETERS)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t, p: t.pop((1, "q_proj", p)), r"1 missing: layers\.1\.q_proj\.{p}"),
        (lambda t, p: t.update({(0, "k_proj", p): torch.ones(1)}), r"1 unexpected: layers\.0\.k_proj\.{p}"),
        (lambda t, p: t.update({(2, "q_proj", p): t[0, "q_proj", p]}), r"missing: layers\.2\.down_proj\.\w+, layers"),
        (
            lambda t, p: t.update({(0, "v_proj", p): t[0, "v_proj", p][..., :1]}),
            r"1 of another shape: layers\.0\.v_proj\.{p} is",
        ),
        (lambda t, p: t.clear(), r"\d missing"),
    ],
)
def test_incomplete_adapters_are_refused_and_nothing_is_written(
    method: str, damage: Callable[[dict[TensorKey, Tensor], str], object], message: str, tmp_path: Path
) -> None:
    tensors, last = tensors_of(spec_of(method)), PARAMETERS[method][-1]
    damage(tensors, last)
    with pytest.raises(CheckpointError, match=message.replace("{p}", last)):
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
