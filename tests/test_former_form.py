"""Adapters of a former form of this project, with a rank expansion: MALoRA is refused, the other methods load."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from malora_dist.checkpoint.convert import read_adapter_weights
from malora_dist.errors import CheckpointError, ConfigError
from malora_dist.hf.evaluate import load_adapter
from malora_dist.hf.read import read_peft_adapter
from tests.hf_models import adapter_config, logits, randomise, tiny_llama
from tests.test_conversion_adapter import assert_equal, make_adapter_checkpoint, run_tool, spec_of  # noqa: F401 (fixture)
from tests.test_errors import check_refused, run_arguments
from tests.workers import WorkerPool

REFUSAL = (
    "rank_expansion=1.25: is of MALoRA in a former form of this project, which was not the paper's; "
    "train it again, with the rank of one expert as lora_rank"
)


def former(fields: dict[str, object]) -> dict[str, object]:
    """The settings of an adapter as the former form had them."""
    return {k: v for k, v in fields.items() if k not in ("beta", "freeze")} | {"rank_expansion": 1.25}


def make_version_1(directory: Path) -> None:
    """Rewrite adapter.json of an `iter_*` directory."""
    file = directory / "adapter.json"
    text = json.loads(file.read_text())
    file.write_text(json.dumps(text | {"format_version": 1, "spec": former(text["spec"])}))
    (directory / "manifest.json").unlink(missing_ok=True)  # it came later


def make_former_peft(directory: Path) -> None:
    """Rewrite adapter_config.json of a PEFT directory."""
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(former(json.loads(file.read_text()))))


# --- checkpoints


@pytest.mark.parametrize("method", ["lora", "asymmetric_lora", "molora"])
def test_version_1_is_read_where_the_method_is_what_it_was(tmp_path: Path, base_dir: Path, method: str) -> None:
    full = make_adapter_checkpoint(tmp_path, spec_of(method), base_dir)
    make_version_1(tmp_path / "iter_0000100")
    adapter = read_adapter_weights(tmp_path)
    assert adapter.spec == spec_of(method)
    assert_equal(adapter.tensors, full)


def test_a_molora_of_version_1_resumes(
    workers: WorkerPool, base_dir: Path, task_files: list[Path], tmp_path: Path
) -> None:
    arguments = run_arguments(base_dir, task_files[0], tmp_path, "method=molora")
    [begun] = workers.run("jobs_errors:train_main", 1, arguments=arguments)
    make_version_1(tmp_path / "iter_0000001")
    [ended] = workers.run("jobs_errors:train_main", 1, arguments=[*arguments, f"load={tmp_path}", "train_iters=2"])
    assert (begun.code, begun.stderr, ended.code, ended.stderr) == (0, "", 0, "")
    assert json.loads((tmp_path / "iter_0000002" / "adapter.json").read_text())["format_version"] == 3


def test_malora_of_version_1_is_not_resumed(
    workers: WorkerPool, base_dir: Path, task_files: list[Path], tmp_path: Path
) -> None:
    make_adapter_checkpoint(tmp_path / "load", spec_of(), base_dir)
    make_version_1(tmp_path / "load" / "iter_0000100")
    arguments = run_arguments(base_dir, task_files[0], tmp_path / "save", f"load={tmp_path / 'load'}")
    [ended] = workers.run("jobs_errors:train_main", 1, arguments=arguments)
    check_refused(ended, f"{tmp_path / 'load' / 'iter_0000100' / 'adapter.json'}: {REFUSAL}", tmp_path / "save")


def test_malora_of_version_1_is_not_exported(
    tmp_path: Path, base_dir: Path, run_tool: Callable[..., None]  # noqa: F811
) -> None:  # fmt: skip
    make_adapter_checkpoint(tmp_path / "save", spec_of(), base_dir)
    make_version_1(tmp_path / "save" / "iter_0000100")
    with pytest.raises(CheckpointError, match=re.escape(f"adapter.json: {REFUSAL}") + "$"):
        run_tool("export-adapter", "--megatron-path", tmp_path / "save", "--hf-path", tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


# --- PEFT directories


def save_former_peft(method: str, directory: Path) -> torch.nn.Module:
    """A model with the adapter that is then saved in `directory`/adapter in the former form."""
    tiny_llama().save_pretrained(directory / "base")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(directory / "base"), adapter_config(method))
    randomise(model)
    model.save_pretrained(directory / "adapter")
    make_former_peft(directory / "adapter")
    return model


LOADERS: dict[str, Callable[[Path], torch.nn.Module]] = {
    "PeftModel": lambda adapter: PeftModel.from_pretrained(tiny_llama(), adapter),
    "AutoPeftModelForCausalLM": AutoPeftModelForCausalLM.from_pretrained,
    "AutoModelForCausalLM": AutoModelForCausalLM.from_pretrained,
    "tools/evaluate.py": lambda adapter: load_adapter(tiny_llama(), adapter),
}


@pytest.mark.parametrize("loader", LOADERS)
def test_former_malora_is_loaded_by_nobody(loader: str, tmp_path: Path) -> None:
    save_former_peft("malora", tmp_path)
    with pytest.raises((CheckpointError, ConfigError), match=re.escape(REFUSAL) + "$"):
        LOADERS[loader](tmp_path / "adapter")


@pytest.mark.parametrize("loader", LOADERS)
def test_former_molora_is_loaded_by_all(loader: str, tmp_path: Path) -> None:
    model = save_former_peft("molora", tmp_path)
    assert torch.equal(logits(LOADERS[loader](tmp_path / "adapter")), logits(model))


def test_former_malora_is_not_imported(tmp_path: Path, run_tool: Callable[..., None]) -> None:  # noqa: F811
    save_former_peft("malora", tmp_path)
    with pytest.raises(CheckpointError, match=re.escape(f"adapter_config.json: {REFUSAL}") + "$"):
        run_tool("import-adapter", "--adapter", tmp_path / "adapter", "--megatron-path", tmp_path / "imported")
    assert not (tmp_path / "imported").exists()


def test_former_molora_is_imported(tmp_path: Path) -> None:
    model = save_former_peft("molora", tmp_path)
    adapter = read_peft_adapter(tmp_path / "adapter")
    assert adapter.spec.identity() == adapter_config("molora").identity()
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.up_proj")
    assert torch.equal(adapter.tensors[1, "up_proj", "B"], layer.malora_B["default"])
