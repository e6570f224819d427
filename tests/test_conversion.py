"""Hugging Face <-> megatron: the map, streaming, exact round trips, and what is refused and how."""

from __future__ import annotations

import json
import re
import shutil
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from malora_dist.checkpoint.base import checkpoint_dir, hf_dir, read_base_info
from malora_dist.checkpoint.convert import export_hf, fingerprint_hf, import_hf, roundtrip
from malora_dist.checkpoint.torch_dist import TensorChunk, TorchDistReader, write_torch_dist
from malora_dist.errors import CheckpointError
from malora_dist.families.base import family_of
from malora_dist.families.conversion import Chunk

ROOT = Path(__file__).resolve().parents[1]
STORIES = ROOT.parent / "shared" / "models" / "stories260k"

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip


QWEN_2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
QWEN_3 = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}


def make_llama(directory: Path, dtype: torch.dtype = torch.float32, shard: str = "1GB", **fields: object) -> Path:
    """A tiny random Llama, untied with grouped queries unless `fields` say otherwise."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 11}
    config = LlamaConfig(**sizes | {"num_attention_heads": 4, "num_key_value_heads": 2} | fields)
    LlamaForCausalLM(config).to(dtype).save_pretrained(directory, max_shard_size=shard)
    return directory


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untied Llama; copy it before changing it."""
    return make_llama(tmp_path_factory.mktemp("llama") / "hf")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    """`llama`, converted; copy it before changing it."""
    path = tmp_path_factory.mktemp("base") / "base"
    import_hf(llama, path)
    return path


def run_tool(convert_tool: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["convert_hf.py", *map(str, arguments)])
    convert_tool.main()


# --- the map


def test_qkv_is_interleaved_by_query_group() -> None:
    """Two groups, two query heads per group, head_dim 1: each row is one head."""
    chunk = Chunk("qkv", 1, 3, {"q": (4, 2), "k": (2, 2), "v": (2, 2)}, groups=2)
    q, k, v = torch.arange(8.0).view(4, 2), torch.arange(10.0, 14).view(2, 2), torch.arange(20.0, 24).view(2, 2)
    fused = chunk.fuse({"q": q, "k": k, "v": v})
    expected = torch.stack([q[0], q[1], k[0], v[0], q[2], q[3], k[1], v[1]])
    assert torch.equal(fused, expected[None])
    assert (chunk.shape, chunk.global_shape, chunk.offset) == ((1, 8, 2), (3, 8, 2), (1, 0, 0))
    assert {key: t.tolist() for key, t in chunk.split(fused).items()} == {
        "q": q.tolist(), "k": k.tolist(), "v": v.tolist()
    }  # fmt: skip


# --- round trips


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "head_dim": 16},
        {"dtype": torch.bfloat16},
        {"shard": "40kB"},
        {"rope_parameters": LLAMA3_ROPE, "max_position_embeddings": 128},
    ],
    ids=["untied-gqa", "tied", "mha", "head_dim", "bf16", "sharded", "llama3-rope"],
)
def test_roundtrip_is_exact(tmp_path: Path, fields: dict) -> None:
    hf = make_llama(tmp_path / "hf", **fields)
    count = roundtrip(hf, tmp_path / "base", tmp_path / "back", max_shard_bytes=100_000)
    tied = fields.get("tie_word_embeddings", False)
    assert count == 9 * 11 + (2 if tied else 3)
    assert len(list((tmp_path / "back").glob("model-*-of-*.safetensors"))) > 1
    before = AutoModelForCausalLM.from_pretrained(hf).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype == fields.get("dtype", torch.float32)
        assert torch.equal(tensor, after[key]), key


def test_roundtrip_of_a_real_model(
    tmp_path: Path, convert_tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not STORIES.is_dir():
        pytest.skip("needs the folder shared/ beside the checkout")
    run_tool(convert_tool, monkeypatch, "roundtrip", "--hf-model", STORIES, "--hf-path", tmp_path / "back")
    assert f"47 tensors of {STORIES} are equal bit by bit" in capsys.readouterr().out
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (STORIES / name).read_bytes()
    assert load_file(tmp_path / "back" / "model.safetensors").keys() == load_file(STORIES / "model.safetensors").keys()


def test_roundtrip_keeps_the_bits_of_nan(tmp_path: Path, llama: Path) -> None:
    hf = edited(llama, tmp_path / "hf", lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    assert roundtrip(hf) == 102


def test_base_info_and_fingerprint(tmp_path: Path, llama: Path, base: Path) -> None:
    info = read_base_info(base)
    model = LlamaForCausalLM.from_pretrained(llama)
    assert info.num_parameters == sum(p.numel() for p in model.parameters())
    assert (info.dtype, info.hf_model_name_or_path) == ("float32", str(llama))
    sharded = tmp_path / "sharded"
    model.save_pretrained(sharded, max_shard_size="40kB")
    assert fingerprint_hf(llama) == fingerprint_hf(sharded) == info.fingerprint
    other = edited(llama, tmp_path / "other", lambda tensors: tensors["model.norm.weight"][0].add_(1e-3))
    assert fingerprint_hf(other) != info.fingerprint


def test_redundant_tensors_are_checked_and_left_out(tmp_path: Path) -> None:
    """Old files carry rotary buffers and a copy of the tied output layer."""

    def add(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.3.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    tied = make_llama(tmp_path / "tied", tie_word_embeddings=True)
    old = edited(tied, tmp_path / "old", add)
    assert roundtrip(old) == roundtrip(tied) == 101
    assert fingerprint_hf(old) == fingerprint_hf(tied)
    edited(old, tmp_path / "bad", lambda tensors: tensors["lm_head.weight"][0].add_(1))
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' differs from 'model\.embed_tokens\.weight'"):
        import_hf(tmp_path / "bad", tmp_path / "base")


def test_writer_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def load() -> Tensor:
        nonlocal most
        most = max(most, sum(ref() is not None for ref in alive))
        tensor = torch.zeros(1, 5)
        alive.append(weakref.ref(tensor))
        return tensor

    chunks = [TensorChunk(key, torch.float32, (50, 5), (i, 0), (1, 5), load) for i in range(50) for key in ("a", "b")]
    write_torch_dist(tmp_path / "ckpt", chunks)
    assert len(alive) == 100
    assert most <= 1, "tensors that are on disk are still in memory"


# --- what is refused


def edited(source: Path, target: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of a one-file model with changed tensors."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def with_config(source: Path, target: Path, **fields: object) -> Path:
    """A copy of a model with changed config.json."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text()) | fields
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(surprise=torch.ones(2)), "tensor 'surprise' is not part of a Llama and would be lost"),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}),
            "tensor 'model.layers.0.self_attn.q_proj.bias' is not part of a Llama",
        ),
        (
            lambda t: t.pop("model.layers.10.mlp.up_proj.weight"),
            "tensor 'model.layers.10.mlp.up_proj.weight' of shape [48, 32] is missing",
        ),
        (lambda t: t.pop("lm_head.weight"), "tensor 'lm_head.weight' of shape [50, 32] is missing"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(31)}),
            "tensor 'model.norm.weight' has shape [31], but config.json gives [32]",
        ),
        (
            lambda t: t.update({"model.layers.5.mlp.up_proj.weight": torch.ones(48, 32, dtype=torch.bfloat16)}),
            "tensor 'model.layers.5.mlp.up_proj.weight' is torch.bfloat16, but 'model.layers.0.mlp.gate_proj.weight'",
        ),
    ],
    ids=["unknown", "bias", "missing", "missing-head", "shape", "dtype"],
)
def test_tensors_that_do_not_fit(tmp_path: Path, llama: Path, change: Callable, message: str) -> None:
    hf = edited(llama, tmp_path / "hf", change)
    with pytest.raises(CheckpointError, match=re.escape(message)) as error:
        import_hf(hf, tmp_path / "base")
    assert str(hf) in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"], "nothing is left behind"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model_type": "gpt2"},
            "model_type='gpt2', must be one of llama, mistral, qwen2, qwen3; use a model of one of these",
        ),
        (MISTRAL | {"sliding_window": 0}, "sliding_window=0, must be null or at least 1; correct it"),
        (MISTRAL | {"hidden_act": "gelu"}, "must be 'silu'; use a Mistral with the SwiGLU of the original"),
        (
            QWEN_2 | {"use_sliding_window": True, "layer_types": ["chunked_attention"]},
            "must be a list of full_attention",
        ),
        (QWEN_2 | {"layer_types": "full_attention"}, "has layer_types='full_attention', must be a list"),
        (QWEN_2 | {"hidden_act": "gelu"}, "must be 'silu'; use a Qwen2 with the SwiGLU of the original"),
        (QWEN_2 | {"num_attention_heads": 0}, "num_attention_heads=0, must be a whole number"),
        (QWEN_3 | {"attention_bias": True}, "attention_bias=True, must be False; use a Qwen3 without attention biases"),
        ({"model_type": "qwen3_moe"}, "model_type='qwen3_moe', must be one of"),
        (MISTRAL | {"architectures": ["MixtralForCausalLM"]}, "must be ['MistralForCausalLM']; only Mistral models"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures=['LlamaForSequenceClassification']"),
        ({"attention_bias": True}, "attention_bias=True, must be False"),
        ({"mlp_bias": True}, "mlp_bias=True, must be False"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu', must be 'silu'"),
        ({"pretraining_tp": 2}, "pretraining_tp=2, must be 1"),
        ({"quantization_config": {"quant_method": "gptq"}}, "must be None; use the unquantised model"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_parameters.rope_type='yarn', must be one of"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic"}}, "rope_scaling.rope_type='dynamic'"),
        ({"rope_parameters": {"rope_type": "linear"}}, 'transformers refuses it ("Missing required keys'),
        (
            {"rope_parameters": LLAMA3_ROPE, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "has both rope_parameters={'rope_type': 'llama3'",
        ),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 must divide num_attention_heads=4"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0, must be a whole number in [1, 65536)"),
        ({"hidden_size": "big"}, "transformers refuses it (Validation error for field 'hidden_size'"),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, llama: Path, fields: dict, message: str) -> None:
    hf = with_config(llama, tmp_path / "hf", **fields)
    with pytest.raises(CheckpointError, match=re.escape(message)) as error:
        family_of(hf)
    assert str(hf) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("rope", "frequencies"),
    [
        ({"rope_theta": 5e5}, [5e5 ** -(i / 4) for i in range(4)]),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2}}, [1e4 ** -(i / 4) / 2 for i in range(4)]),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, [1e6 ** -(i / 4) for i in range(4)]),
    ],
    ids=["old", "old-linear", "new"],
)
def test_rope_of_old_and_new_configs(tmp_path: Path, llama: Path, rope: dict, frequencies: list[float]) -> None:
    hf = with_config(llama, tmp_path / "hf", **{"rope_parameters": None} | rope)
    torch.testing.assert_close(family_of(hf).rope_inv_freq(), torch.tensor(frequencies))


def corrupt_weights(hf: Path) -> None:
    (hf / "model.safetensors").write_bytes((hf / "model.safetensors").read_bytes()[:-100])


def to_bin(hf: Path) -> None:
    (hf / "model.safetensors").rename(hf / "pytorch_model.bin")


def index_of_missing_file(hf: Path) -> None:
    (hf / "model.safetensors").rename(hf / "a.safetensors")
    keys = dict.fromkeys(load_file(hf / "a.safetensors"), "a.safetensors") | {"lm_head.weight": "b.safetensors"}
    (hf / "model.safetensors.index.json").write_text(json.dumps({"weight_map": keys}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda hf: (hf / "config.json").unlink(), "has no config.json"),
        (lambda hf: (hf / "config.json").write_text("{"), "config.json: is not JSON"),
        (lambda hf: (hf / "model.safetensors").unlink(), "has no model.safetensors and no model.safetensors."),
        (corrupt_weights, "model.safetensors: is not a whole safetensors file"),
        (to_bin, "holds its weights as .bin files, must be safetensors"),
        (index_of_missing_file, "b.safetensors: is missing, but the index names it"),
    ],
)
def test_incomplete_hugging_face_directories(tmp_path: Path, llama: Path, change: Callable, message: str) -> None:
    change(shutil.copytree(llama, tmp_path / "hf"))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        import_hf(tmp_path / "hf", tmp_path / "base")


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def without_manifest(base: Path) -> Path:
    (base / "manifest.json").unlink()
    return base


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: shutil.rmtree(b), "is not a directory; make it with"),
        (lambda b: (b / "malora_base.json").unlink(), "is not a converted base, malora_base.json is missing"),
        (lambda b: (b / "latest_checkpointed_iteration.txt").unlink(), "latest_checkpointed_iteration.txt is missing"),
        (lambda b: (b / "latest_checkpointed_iteration.txt").write_text("x"), "holds 'x', must be the number"),
        (lambda b: shutil.rmtree(b / "iter_0000000"), "iter_0000000 named by latest_checkpointed_iteration.txt"),
        (lambda b: (b / "iter_0000000" / ".metadata").unlink(), "is half-written, .metadata is missing"),
        (lambda b: truncate(b / "iter_0000000" / ".metadata"), ".metadata: is cut off or damaged"),
        (lambda b: (b / "iter_0000000" / "__3_0.distcp").unlink(), "is half-written, __3_0.distcp is missing"),
        (lambda b: truncate(b / "iter_0000000" / "__3_0.distcp"), "__3_0.distcp: is half-written, has"),
        (lambda b: (b / "iter_0000000" / "common.pt").unlink(), "is half-written, iter_0000000/common.pt is missing"),
        (lambda b: (b / "hf" / "config.json").unlink(), "is half-written, hf/config.json is missing"),
    ],
)
def test_bases_that_are_not_whole(tmp_path: Path, base: Path, change: Callable, message: str) -> None:
    """Of an earlier version, without a manifest; with one see test_checkpoints.py."""
    change(without_manifest(shutil.copytree(base, tmp_path / "base")))
    for read in (lambda: read_base_info(tmp_path / "base"), lambda: export_hf(tmp_path / "base", tmp_path / "back")):
        with pytest.raises(CheckpointError, match=re.escape(message)) as error:
            read()
        assert str(tmp_path / "base") in str(error.value)


def test_export_notices_changed_weights_and_another_config(tmp_path: Path, base: Path) -> None:
    without_manifest(shutil.copytree(base, tmp_path / "bits"))
    data = tmp_path / "bits" / "iter_0000000" / "__1_0.distcp"
    stored = TorchDistReader(checkpoint_dir(base)).read("decoder.final_layernorm.weight").numpy().tobytes()
    content = data.read_bytes()
    assert content.count(stored) == 1
    data.write_bytes(content.replace(stored, b"\1" + stored[1:]))
    with pytest.raises(CheckpointError, match="its weights have changed since the import"):
        export_hf(tmp_path / "bits", tmp_path / "back")
    without_manifest(shutil.copytree(base, tmp_path / "config"))
    file = hf_dir(tmp_path / "config") / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": 51}))
    with pytest.raises(CheckpointError, match=re.escape("is (50, 32), but by hf/config.json must be (51, 32)")):
        export_hf(tmp_path / "config", tmp_path / "back")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bits", "config"], "nothing is left behind"


def test_only_an_earlier_result_is_replaced(tmp_path: Path, llama: Path, base: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    import_hf(llama, target)
    import_hf(llama, target)
    assert read_base_info(target).fingerprint == read_base_info(base).fingerprint
    (target / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and is not an earlier result of this command"):
        import_hf(llama, target)
    with pytest.raises(CheckpointError, match="exists and is not an earlier result of this command"):
        export_hf(base, target)
    assert (target / "notes.txt").read_text() == "mine"


def test_tool_reports_errors_in_one_line(
    tmp_path: Path, convert_tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_tool(convert_tool, monkeypatch, "import", "--hf-model", tmp_path, "--megatron-path", tmp_path / "base")
    assert capsys.readouterr().err == (
        f"error: {tmp_path}: has no config.json; "
        "name the directory of a Hugging Face model: Llama, Mistral, Qwen2, Qwen3\n"
    )
