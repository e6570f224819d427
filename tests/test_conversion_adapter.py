"""Adapters between training and PEFT: read from any layout, exported, imported again, and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from malora_dist.checkpoint.base import checkpoint_dir, read_base_info
from malora_dist.checkpoint.convert import import_hf, read_adapter_weights
from malora_dist.checkpoint.torch_dist import TensorChunk, TorchDistReader, write_megatron_files, write_torch_dist
from malora_dist.errors import CheckpointError
from malora_dist.hf.export import write_peft_adapter
from malora_dist.hf.keys import TensorKey
from malora_dist.hf.read import read_peft_adapter
from malora_dist.methods.spec import AdapterSpec
from tests.conftest import write_llama
from tests.hf_models import PARAMETERS
from tests.layouts import find
from tests.test_parity import assemble, overrides
from tests.workers import WorkerPool

LAYERS = 2
TARGETS = ["q_proj", "v_proj", "down_proj"]
WIDTHS = {"q_proj": (32, 32), "v_proj": (32, 16), "down_proj": (48, 32)}
QKV, FC2 = "decoder.layers.self_attention.linear_qkv.adapters", "decoder.layers.mlp.linear_fc2.adapters"
METHODS_AND_FUSION = [(method, fused) for method in PARAMETERS for fused in (False, True)]
#: What no two projections share, where it is not B alone.
OWN = {"dora": ("B", "magnitude"), "malora_b": ("S",)}
STOCK_KEYS = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}


def spec_of(method: str = "malora", **fields: Any) -> AdapterSpec:
    return AdapterSpec(method=method, target_modules=TARGETS, shared_dim=8, **fields)


def stored_keys(spec: AdapterSpec) -> dict[str, list[tuple[str, str]]]:
    """{key of a stacked tensor in a checkpoint: the (projection, parameter)s that it is for}, by the docs."""
    names = PARAMETERS[spec.method]
    keys = {f"{FC2}.down_proj.{name}": [("down_proj", name)] for name in names}
    for name in names:
        if not spec.fuse_projections:
            keys |= {f"{QKV}.{p}.{name}": [(p, name)] for p in ("q_proj", "v_proj")}
        elif name in OWN.get(spec.method, ("B",)):
            keys |= {f"{QKV}.linear_qkv.{name}_{p}": [(p, name)] for p in ("q_proj", "v_proj")}
        else:
            keys[f"{QKV}.linear_qkv.{name}"] = [("q_proj", name), ("v_proj", name)]
    return keys


def make_adapter_checkpoint(save: Path, spec: AdapterSpec, base: Path) -> dict[TensorKey, Tensor]:
    """What training saves, as if written by two expert-parallel ranks; returns the full tensors."""
    torch.manual_seed(3)
    chunks: list[TensorChunk] = []
    full: dict[TensorKey, Tensor] = {}
    for key, holders in stored_keys(spec).items():
        projection, name = holders[0]
        shape = spec.declared.shape(name, *WIDTHS[projection])
        stacked = torch.randn(LAYERS, *shape)
        full |= {(layer, p, name): stacked[layer] for layer in range(LAYERS) for p, _ in holders}
        for rank, part in enumerate(stacked.chunk(2, dim=1)):
            offset = (0, rank * part.shape[1], *(0 for _ in shape[1:]))
            chunks.append(
                TensorChunk(key, part.dtype, tuple(stacked.shape), offset, tuple(part.shape), part.contiguous)
            )
    moment = TensorChunk("optimizer.state.exp_avg.decoder.x", torch.float32, (3,), (0,), (3,), lambda: torch.ones(3))
    write_torch_dist(save / "iter_0000100", [*chunks, moment])
    write_megatron_files(save / "iter_0000100")
    info = read_base_info(base)
    text = {
        "format_version": 2,
        "spec": spec.adapter_fields(),
        "base": {"fingerprint": info.fingerprint, "hf_model_name_or_path": info.hf_model_name_or_path},
        "iteration": 100,
        "num_layers": LAYERS,
    }
    (save / "iter_0000100" / "adapter.json").write_text(json.dumps(text))
    (save / "latest_checkpointed_iteration.txt").write_text("100")
    return full


def assert_equal(found: Any, expected: dict[TensorKey, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == torch.float32
        assert torch.equal(found[key], tensor), key


@pytest.fixture
def run_tool(convert_tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``python tools/convert_hf.py ARGUMENTS``, errors raised as they are."""

    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["convert_hf.py", *map(str, arguments)])
        convert_tool.main.__wrapped__()

    return run


# --- training -> PEFT


@pytest.mark.parametrize(("method", "fused"), METHODS_AND_FUSION)
def test_adapter_weights_are_read_from_any_layout(tmp_path: Path, base_dir: Path, method: str, fused: bool) -> None:
    spec = spec_of(method, fuse_projections=fused)
    full = make_adapter_checkpoint(tmp_path, spec, base_dir)
    adapter = read_adapter_weights(tmp_path)
    assert (adapter.spec, adapter.iteration) == (spec, 100)
    assert adapter.base_fingerprint == read_base_info(base_dir).fingerprint
    assert_equal(adapter.tensors, full)


def test_adapter_export_refuses_another_base(
    tmp_path: Path, llama_dir: Path, base_dir: Path, run_tool: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    make_adapter_checkpoint(tmp_path / "save", spec_of(), base_dir)
    arguments = ("export-adapter", "--megatron-path", tmp_path / "save", "--hf-path", tmp_path / "peft", "--hf-model")
    run_tool(*arguments, llama_dir)
    assert "exported 24 tensors of iteration 100" in capsys.readouterr().out
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(llama_dir)
    with pytest.raises(CheckpointError, match="but the adapter was trained on"):
        run_tool(*arguments, write_llama(tmp_path / "other", seed=1))


def test_adapter_tensors_that_do_not_fit_their_description(tmp_path: Path, base_dir: Path) -> None:
    make_adapter_checkpoint(tmp_path, spec_of(), base_dir)
    file = tmp_path / "iter_0000100" / "adapter.json"
    text = json.loads(file.read_text())
    for change, message in (
        ({"spec": text["spec"] | {"target_modules": [*TARGETS, "k_proj"]}}, "adapters.k_proj.B' is missing"),
        ({"spec": text["spec"] | {"method": "molora"}}, "adapters.down_proj.A' is missing"),
        ({"spec": text["spec"] | {"target_modules": ["q_proj"]}}, "adapters.down_proj.B' is not part of the adapter"),
        ({"spec": text["spec"] | {"fuse_projections": True}}, "adapters.linear_qkv.B_q_proj' is missing"),
        ({"num_layers": 3}, "has 2 layers, adapter.json says 3"),
    ):
        file.write_text(json.dumps(text | change))
        with pytest.raises(CheckpointError, match=message):
            read_adapter_weights(tmp_path)


# --- PEFT -> training


def contents(peft: Path) -> tuple[dict[str, Any], dict[str, str], dict[str, Tensor]]:
    """(config, metadata, tensors) of a PEFT directory."""
    with safe_open(peft / "adapter_model.safetensors", "pt") as opened:
        metadata = opened.metadata()
    return (
        json.loads((peft / "adapter_config.json").read_text()),
        metadata,
        load_file(peft / "adapter_model.safetensors"),
    )


@pytest.mark.parametrize(("method", "fused"), METHODS_AND_FUSION)
def test_export_import_export_is_exact(
    tmp_path: Path, base_dir: Path, method: str, fused: bool, run_tool: Callable[..., None]
) -> None:
    spec = spec_of(method, fuse_projections=fused, use_rslora=True, lora_dropout=0.1, beta=1.25)
    full = make_adapter_checkpoint(tmp_path / "save", spec, base_dir)
    run_tool("export-adapter", "--megatron-path", tmp_path / "save", "--hf-path", tmp_path / "peft")
    options = ["--fuse-projections"] if fused else []
    run_tool("import-adapter", "--adapter", tmp_path / "peft", "--megatron-path", tmp_path / "imported", *options)
    run_tool("export-adapter", "--megatron-path", tmp_path / "imported", "--hf-path", tmp_path / "again")

    before, after = contents(tmp_path / "peft"), contents(tmp_path / "again")
    assert before[:2] == after[:2]
    assert before[0].get("fuse_projections", False) is False
    assert before[2].keys() == after[2].keys()
    assert all(torch.equal(before[2][key], after[2][key]) for key in before[2])

    imported = read_adapter_weights(tmp_path / "imported")
    assert_equal(imported.tensors, full)
    assert (imported.spec.method, imported.spec.fuse_projections, imported.iteration) == (method, fused, 0)
    assert imported.base_fingerprint == read_base_info(base_dir).fingerprint
    directory = checkpoint_dir(tmp_path / "imported")
    assert json.loads((directory / "adapter.json").read_text())["has_optimizer"] is False
    assert TorchDistReader(directory).tensors.keys() == stored_keys(spec).keys()
    others = {p.name for p in directory.iterdir() if p.suffix != ".distcp"}
    assert others == {".metadata", "adapter.json", "common.pt", "manifest.json", "metadata.json"}


def stock_lora(llama: Path, directory: Path, **fields: Any) -> Path:
    """A LoRA that stock PEFT made and saved, in bfloat16."""
    torch.manual_seed(5)
    base = LlamaForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
    model = get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": TARGETS} | fields))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter).bfloat16()
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_lora_of_stock_peft(
    tmp_path: Path, llama_dir: Path, base_dir: Path, run_tool: Callable[..., None], method: str
) -> None:
    peft = stock_lora(llama_dir, tmp_path / "peft", use_dora=method == "dora")
    arguments = ("import-adapter", "--adapter", peft, "--megatron-path", tmp_path / "imported")
    with pytest.raises(CheckpointError, match=r"does not tell the fingerprint of its base; .* --base"):
        run_tool(*arguments)
    run_tool(*arguments, "--base", base_dir)
    adapter = read_adapter_weights(tmp_path / "imported")
    assert (adapter.spec.method, adapter.spec.lora_rank, adapter.spec.lora_alpha) == (method, 4, 12)
    assert adapter.spec.projections == ("q_proj", "v_proj", "down_proj")
    assert adapter.base_fingerprint == read_base_info(base_dir).fingerprint
    assert adapter.base_model_name_or_path == str(llama_dir)
    _, _, saved = contents(peft)
    assert_equal(
        adapter.tensors,
        {
            (layer, p, name): saved[f"base_model.model.model.layers.{layer}.{block}.{p}.{key}"].float()
            for layer in range(LAYERS)
            for p, block in (("q_proj", "self_attn"), ("v_proj", "self_attn"), ("down_proj", "mlp"))
            for name, key in STOCK_KEYS.items()
            if name in PARAMETERS[method]
        },
    )


@pytest.fixture
def exported(tmp_path: Path, base_dir: Path) -> Path:
    """A MALoRA adapter of `base_dir` as PEFT directory."""
    make_adapter_checkpoint(tmp_path / "save", spec_of(), base_dir)
    adapter = read_adapter_weights(tmp_path / "save")
    write_peft_adapter(tmp_path / "peft", adapter.spec, adapter.tensors, "some/base", adapter.base_fingerprint)
    return tmp_path / "peft"


def test_import_takes_only_the_base_of_the_adapter(
    tmp_path: Path, llama_dir: Path, exported: Path, base_dir: Path, run_tool: Callable[..., None]
) -> None:
    def import_for(adapter: Path, base: Path) -> None:
        run_tool("import-adapter", "--adapter", adapter, "--megatron-path", tmp_path / "imported", "--base", base)

    import_for(exported, base_dir)
    assert read_adapter_weights(tmp_path / "imported").base_model_name_or_path == str(llama_dir)
    lora = stock_lora(llama_dir, tmp_path / "lora")
    for adapter, fields, message in (
        (exported, {"seed": 1}, "but the adapter was trained on some/base with"),
        (lora, {"num_hidden_layers": 3}, "has 3 layers, the adapter 2"),
        (
            lora,
            {"num_key_value_heads": 4},
            r"v_proj is 32 -> 32, .* layers.0.v_proj.B must be \[32, 4\], not \[16, 4\]",
        ),
    ):
        base = tmp_path / "other"
        import_hf(write_llama(tmp_path / "llama", **fields), base)
        with pytest.raises(CheckpointError, match=message):
            import_for(adapter, base)


def test_other_parameters_may_be_frozen_from_an_import_on(
    tmp_path: Path, exported: Path, base_dir: Path, run_tool: Callable[..., None]
) -> None:
    from malora_dist.checkpoint.adapter import check_adapter_matches, check_whole

    run_tool("import-adapter", "--adapter", exported, "--megatron-path", tmp_path / "imported")
    frozen, base = spec_of(freeze=["S"]), read_base_info(base_dir)
    imported, trained = (checkpoint_dir(tmp_path / name) for name in ("imported", "save"))
    check_adapter_matches(imported, check_whole(imported), frozen, base)
    with pytest.raises(CheckpointError, match=r"has freeze=\[\], the config says \['S'\]; set it to the checkpoint's"):
        check_adapter_matches(trained, check_whole(trained), frozen, base)


def test_fusing_needs_equal_copies(tmp_path: Path, exported: Path, run_tool: Callable[..., None]) -> None:
    with pytest.raises(
        CheckpointError, match=r"layers\.0 would keep one router for q_proj, v_proj, but those of q_proj"
    ):
        run_tool(
            "import-adapter", "--adapter", exported, "--megatron-path", tmp_path / "imported", "--fuse-projections"
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["peft", "save"], "nothing is left behind"


def test_import_replaces_only_an_earlier_import(tmp_path: Path, exported: Path, run_tool: Callable[..., None]) -> None:
    arguments = ("import-adapter", "--adapter", exported, "--megatron-path")
    run_tool(*arguments, tmp_path / "imported")
    run_tool(*arguments, tmp_path / "imported")
    with pytest.raises(CheckpointError, match="exists and is not an earlier result of this command"):
        run_tool(*arguments, tmp_path / "save")
    assert read_adapter_weights(tmp_path / "save").iteration == 100


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3', must be LORA or MALORA"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] has no place"),
        ({"fuse_projections": True}, "fuse_projections=True has no place"),
        ({"surprise": 1}, "surprise=1 has no place"),
        ({"target_modules": "all-linear"}, "target_modules='all-linear', must be a list"),
        ({"target_modules": ["q_proj", "v_proj"]}, r"down_proj\.malora_B' \(8 such\) is not part of the adapter"),
        ({"target_modules": [*TARGETS, "k_proj"]}, r"8 missing: layers\.0\.k_proj\.B"),
        ({"topk": 9}, "topk=9: must not exceed num_lora_experts=8"),
        ({"lora_rank": "8"}, "lora_rank='8', must be of type int; save"),
        ({"method": None}, "method=None, must be of type str; save"),
        ({"freeze": "S"}, "freeze=.S., must be of type list of str; save"),
        ({"freeze": [["S"]]}, r"freeze=\[\[.S.\]\], must be of type list of str; save"),
        (
            {"num_lora_experts": 4},
            r"of another shape: layers\.0\.down_proj\.B is \[8, 32, 12\] instead of \[4, 32, 12\]",
        ),
    ],
)
def test_configs_that_cannot_be_imported(exported: Path, fields: dict[str, Any], message: str) -> None:
    file = exported / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    with pytest.raises(CheckpointError, match=message) as error:
        read_peft_adapter(exported)
    assert str(exported) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, r"6 missing: layers\.0\.down_proj\.magnitude, "),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern="),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"layers_to_transform": [0]}, r"layers_to_transform=\[0\]"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
        ({"target_modules": "q_proj|v_proj|down_proj"}, "must be a list"),
    ],
)
def test_loras_that_cannot_be_imported(tmp_path: Path, llama_dir: Path, fields: dict[str, Any], message: str) -> None:
    peft = stock_lora(llama_dir, tmp_path / "peft")
    read_peft_adapter(peft)
    file = peft / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    with pytest.raises(CheckpointError, match=message):
        read_peft_adapter(peft)


def change_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def damage(peft: Path) -> None:
        file = peft / "adapter_model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return damage


KEY = "base_model.model.model.layers.1.self_attn.q_proj.malora_"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "adapter_config.json").unlink(), "has no adapter_config.json"),
        (lambda p: (p / "adapter_config.json").write_text("{"), "is not JSON"),
        (lambda p: (p / "adapter_config.json").write_text("[]"), "is not a JSON object"),
        (lambda p: (p / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
        (lambda p: (p / "adapter_model.safetensors").write_bytes(b"12345678"), "is not a whole safetensors file"),
        (change_tensors(lambda t: t.pop(KEY + "P")), r"1 missing: layers\.1\.q_proj\.P"),
        (change_tensors(lambda t: t.update(extra=torch.ones(1))), r"'extra' \(1 such\) is not part of the adapter"),
        (change_tensors(lambda t: t.update({KEY + "S": torch.ones(9, 32)})), r"1\.q_proj\.S is \[9, 32\] instead of"),
        (change_tensors(lambda t: t.update({KEY + "S": t[KEY + "S"].long()})), "is torch.int64, must be one of"),
        (change_tensors(lambda t: t.clear()), r"24 missing|missing: layers\.0"),
    ],
)
def test_adapters_that_are_not_whole(exported: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(exported)
    with pytest.raises(CheckpointError, match=message):
        read_peft_adapter(exported)


# --- with training


@pytest.mark.parametrize(
    ("layout", "adapter"),
    [
        ("TP 2", ["method=dora"]),
        ("TP 2, EP 2", ["method=molora"]),
        ("PP 2 interleaved, EP 2", ["method=malora", "fuse_projections=true", "freeze=[S]"]),
    ],
)
def test_any_layout_exports_its_shards_and_training_starts_from_them(
    layout: str,
    adapter: Sequence[str],
    workers: WorkerPool,
    task_files: list[Path],
    tmp_path: Path,
    run_tool: Callable[..., None],
) -> None:
    """Shards of 4 ranks -> PEFT -> a checkpoint without optimizer -> one process that trains on, no bit changed."""
    place = find(layout)
    import_hf(write_llama(tmp_path / "llama", num_hidden_layers=place.layers), tmp_path / "base")
    settings = overrides(tmp_path / "base", task_files, "train_iters=1", "eval_iters=0", *adapter)
    save = [*place.settings, f"save={tmp_path / 'save'}"]
    ranks = workers.run("jobs_conversion:train_from_shards", place.processes, overrides=settings + save)
    trained = assemble(ranks, lambda start_and_end: start_and_end[1])

    run_tool("export-adapter", "--megatron-path", tmp_path / "save", "--hf-path", tmp_path / "peft")
    spec = read_adapter_weights(tmp_path / "save").spec
    expected = {
        (layer, p, name): trained[f"layers.{layer}.{adapter}.{key}"]
        for layer in range(place.layers)
        for adapter, projections in spec.adapters
        for key, (name, served) in spec.stored_parameters(projections).items()
        for p in served
    }
    assert_equal(read_peft_adapter(tmp_path / "peft").tensors, expected)

    options = ["--fuse-projections"] if spec.fuse_projections else []
    run_tool("import-adapter", "--adapter", tmp_path / "peft", "--megatron-path", tmp_path / "imported", *options)
    load = [f"load={tmp_path / 'imported'}"]
    ((start, end),) = workers.run("jobs_conversion:train_from_shards", 1, overrides=settings + load)
    assert start.keys() == trained.keys()
    for key, (_, _, parameter) in start.items():
        assert torch.equal(parameter, trained[key]), key
        is_frozen = key.rpartition(".")[2] in spec.freeze
        assert torch.equal(parameter, end[key][2]) == is_frozen, f"{key} did not learn, or did though it is frozen"
