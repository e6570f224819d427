"""Models of every family, their config.json as published, their widths tiny: round trips, logits on any layout."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from malora_dist.checkpoint.base import checkpoint_dir
from malora_dist.checkpoint.convert import fingerprint_hf, import_hf, roundtrip
from malora_dist.checkpoint.tensor_files import HfWeights
from malora_dist.checkpoint.torch_dist import TorchDistReader
from malora_dist.families.base import family_of
from malora_dist.families.conversion import conversion_map
from malora_dist.families.llama import Llama
from tests.jobs_conversion import SEQUENCE, token_ids
from tests.workers import WorkerPool

# The fields are those of the published files, and so is what is absent. Numbers are scaled down: widths and token ids
# to a tiny model, original_max_position_embeddings from 8192 to 48 so that 96 tokens go beyond it, and
# max_position_embeddings with it. Head counts keep their ratios.
LLAMA_2: dict[str, Any] = {
    "_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 64, "initializer_range": 0.02, "intermediate_size": 172,
    "max_position_embeddings": 128, "model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 4,
    "num_key_value_heads": 4, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.31.0.dev0", "use_cache": True,
    "vocab_size": 128,
}  # fmt: skip
LLAMA_3: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 120,
    "eos_token_id": 121, "hidden_act": "silu", "hidden_size": 128, "initializer_range": 0.02, "intermediate_size": 224,
    "max_position_embeddings": 128, "model_type": "llama", "num_attention_heads": 8, "num_hidden_layers": 4,
    "num_key_value_heads": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 500000.0,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.40.0.dev0", "use_cache": True,
    "vocab_size": 128,
}  # fmt: skip
ROPE_8 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 48,
    "rope_type": "llama3",
}  # fmt: skip
LLAMA_3_1 = LLAMA_3 | {
    "mlp_bias": False, "max_position_embeddings": 768, "rope_scaling": ROPE_8, "transformers_version": "4.43.0.dev0",
}  # fmt: skip
LLAMA_3_2 = LLAMA_3_1 | {
    "head_dim": 16, "rope_scaling": ROPE_8 | {"factor": 32.0}, "tie_word_embeddings": True,
    "transformers_version": "4.45.0.dev0",
}  # fmt: skip
MISTRAL: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 128, "initializer_range": 0.02, "intermediate_size": 224,
    "max_position_embeddings": 128, "model_type": "mistral", "num_attention_heads": 8, "num_hidden_layers": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.42.0.dev0", "use_cache": True,
    "vocab_size": 128,
}  # fmt: skip
QWEN_2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 120, "eos_token_id": 120,
    "hidden_act": "silu", "hidden_size": 112, "initializer_range": 0.02, "intermediate_size": 224,
    "max_position_embeddings": 128, "max_window_layers": 4, "model_type": "qwen2", "num_attention_heads": 14,
    "num_hidden_layers": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.40.1",
    "use_cache": True, "use_mrope": False, "use_sliding_window": False, "vocab_size": 128,
}  # fmt: skip
QWEN_3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 120,
    "eos_token_id": 121, "head_dim": 16, "hidden_act": "silu", "hidden_size": 64, "initializer_range": 0.02,
    "intermediate_size": 192, "max_position_embeddings": 128, "max_window_layers": 4, "model_type": "qwen3",
    "num_attention_heads": 8, "num_hidden_layers": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 128,
}  # fmt: skip


def in_transformers_5(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json of transformers 4 as transformers 5 spells it."""
    kept = {k: v for k, v in config.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")}
    rope = {"rope_theta": config.get("rope_theta", 10000.0), "rope_type": "default"} | (
        config.get("rope_scaling") or {}
    )
    if "type" in rope:
        rope["rope_type"] = rope.pop("type")
    return kept | {"dtype": config["torch_dtype"], "rope_parameters": rope, "transformers_version": "5.23.0"}


FAMILIES: dict[str, dict[str, Any]] = {
    "Llama-2-7b": LLAMA_2,
    "Llama-2-7b, pad token added": LLAMA_2 | {"pad_token_id": 128, "vocab_size": 129},
    "Llama-2-7b, linear 16k": LLAMA_2 | {"max_sequence_length": 512, "rope_scaling": {"factor": 4.0, "type": "linear"}},
    "Llama-2-70b": LLAMA_2 | {"num_attention_heads": 16, "num_key_value_heads": 2, "hidden_size": 128},
    "Llama-3-8B": LLAMA_3,
    "Llama-3.1-8B-Instruct": LLAMA_3_1 | {"eos_token_id": [121, 122, 123]},
    "Llama-3.1-70B": LLAMA_3_1 | {"num_attention_heads": 16, "hidden_size": 256},
    "Llama-3.2-1B": LLAMA_3_2,
    "Llama-3.2-3B-Instruct, pad token added": LLAMA_3_2 | {
        "num_attention_heads": 6, "hidden_size": 96, "eos_token_id": [121, 122, 123], "vocab_size": 129,
    },
    "Llama-3.2-1B, saved by transformers 5": in_transformers_5(LLAMA_3_2),
    "Llama-3.1-Minitron-4B-Width": LLAMA_3_1 | {"head_dim": 16, "hidden_size": 96},
    "Mistral-7B-v0.3": MISTRAL,
    "Mistral-7B-v0.1": MISTRAL | {
        "rope_theta": 10000.0, "sliding_window": SEQUENCE, "transformers_version": "4.34.0.dev0",
    },
    "Qwen2.5-0.5B": QWEN_2,
    "Qwen2.5-7B-Instruct": QWEN_2 | {
        "hidden_size": 128, "num_attention_heads": 8, "tie_word_embeddings": False, "eos_token_id": 121,
    },
    "Qwen3-0.6B": QWEN_3,
    "Qwen3-8B": QWEN_3 | {"hidden_size": 128, "num_key_value_heads": 2, "tie_word_embeddings": False},
}  # fmt: skip
SCALED = [name for name, config in FAMILIES.items() if config.get("rope_scaling", config.get("rope_parameters"))]
LAYOUTS: dict[str, dict[str, int]] = {
    "one process": {},
    "TP=2": {"tensor_model_parallel_size": 2},
    "PP=2": {"pipeline_model_parallel_size": 2},
    "TP=2 x PP=2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
}
RESAVED_ON = "TP=2 x PP=2"
#: float32 on both sides, in two orders of summation; the largest difference seen is 4e-5, on logits of up to 10.
TOLERANCE = 1e-4


def write_family(directory: Path, config: dict[str, Any]) -> Path:
    """A random model in the published dtype and files with weights large enough to attend sharply."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config | {"initializer_range": 0.15}))
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms and biases start at ones and zeros
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.to(getattr(torch, config.get("torch_dtype", config.get("dtype")))).save_pretrained(directory)
    if config["model_type"] == "llama" and config["transformers_version"] < "4.35":  # as published then
        weights = load_file(directory / "model.safetensors")
        for layer in range(config["num_hidden_layers"]):
            weights[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        save_file(weights, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return directory


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """{family: directory with the model in hf/ and its conversion in base/}."""
    root = tmp_path_factory.mktemp("families")
    for number, config in enumerate(FAMILIES.values()):
        import_hf(write_family(root / str(number) / "hf", config), root / str(number) / "base")
    return {name: root / str(number) for number, name in enumerate(FAMILIES)}


def transformers_logits(hf: Path, **fields: Any) -> Tensor:
    """float32, whatever the published dtype."""
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, **fields)
    with torch.no_grad():
        return model.eval()(token_ids(model.config.vocab_size)).logits


@pytest.fixture(scope="module")
def megatron_logits(families: dict[str, Path], workers: WorkerPool) -> Callable[[str], dict[str, Tensor]]:
    """layout -> {family: logits over the padded vocabulary}. All families of a layout share one run."""

    @cache
    def run(layout: str) -> dict[str, Tensor]:
        parallel = LAYOUTS[layout]
        bases = {name: directory / "base" for name, directory in families.items()}
        ranks = workers.run(
            "jobs_conversion:logits_of_bases",
            math.prod(parallel.values()),
            parallel=parallel,
            bases=bases,
            resave=layout == RESAVED_ON,
        )
        shards = [logits for logits in ranks if logits]  # TP ranks of the last stage
        return {name: torch.cat([shard[name] for shard in shards], dim=-1) for name in bases}

    return run


@pytest.mark.parametrize("family", FAMILIES)
def test_roundtrip_is_exact(family: str, families: dict[str, Path], tmp_path: Path) -> None:
    hf = families[family] / "hf"
    per_layer = {"qwen2": 12, "qwen3": 11}.get(FAMILIES[family]["model_type"], 9)
    ends = 2 if FAMILIES[family]["tie_word_embeddings"] else 3
    assert roundtrip(hf, hf_path=tmp_path / "back") == 4 * per_layer + ends
    assert (tmp_path / "back" / "config.json").read_bytes() == (hf / "config.json").read_bytes()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(
    family: str, layout: str, families: dict[str, Path], megatron_logits: Callable[[str], dict[str, Tensor]]
) -> None:
    expected = transformers_logits(families[family] / "hf")
    found = megatron_logits(layout)[family]
    vocab_size = FAMILIES[family]["vocab_size"]
    padded = vocab_size + vocab_size % LAYOUTS[layout].get("tensor_model_parallel_size", 1)
    assert found.shape == (2, SEQUENCE, padded)
    torch.testing.assert_close(found[..., :vocab_size], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", SCALED)
def test_a_wrong_rope_would_show(family: str, families: dict[str, Path]) -> None:
    """The comparison above can tell scaled frequencies from plain ones, and within llama3's also its three bands."""
    hf = families[family] / "hf"
    scaled = family_of(hf)
    config = scaled.hf
    plain = {"rope_type": "default", "rope_theta": config.rope_parameters["rope_theta"]}
    unscaled = Llama(LlamaConfig(**config.to_dict() | {"rope_parameters": plain}))
    ratios = unscaled.rope_inv_freq() / scaled.rope_inv_freq()
    factor = config.rope_parameters["factor"]
    if config.rope_parameters["rope_type"] == "llama3":
        assert (ratios == 1).any()
        assert ((ratios > 1.1) & (ratios < 0.9 * factor)).any()
    assert ratios.max() == factor
    wrong = transformers_logits(hf, rope_parameters=plain)
    assert (wrong - transformers_logits(hf)).abs().max() > 1000 * TOLERANCE


@pytest.mark.parametrize(("family", "part"), [("Qwen2.5-0.5B", "k_proj.bias"), ("Qwen3-0.6B", "q_norm.weight")])
def test_small_parts_count(family: str, part: str, families: dict[str, Path], tmp_path: Path) -> None:
    """The fingerprint tells them, and so do the logits above."""
    hf = Path(shutil.copytree(families[family] / "hf", tmp_path / "hf"))
    weights = load_file(hf / "model.safetensors")
    weights[f"model.layers.3.self_attn.{part}"].mul_(2)
    save_file(weights, hf / "model.safetensors", {"format": "pt"})
    assert fingerprint_hf(hf) != fingerprint_hf(families[family] / "hf")
    assert (transformers_logits(hf) - transformers_logits(families[family] / "hf")).abs().max() > 100 * TOLERANCE


def test_a_window_of_the_whole_sequence_is_none(families: dict[str, Path]) -> None:
    """One token less would show, at the last token."""
    hf = families["Mistral-7B-v0.1"] / "hf"
    windows = (None, SEQUENCE, SEQUENCE - 1)
    none, whole, shorter = (transformers_logits(hf, sliding_window=window) for window in windows)
    torch.testing.assert_close(whole, none, rtol=0, atol=TOLERANCE)
    assert (shorter - none)[:, -1].abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("family", [name for name, config in FAMILIES.items() if "torch_dtype" in config])
def test_both_spellings_of_config_json_are_the_same_model(family: str, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for directory, fields in ((old, FAMILIES[family]), (new, in_transformers_5(FAMILIES[family]))):
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(fields))
    before, after = family_of(old), family_of(new)
    assert torch.equal(before.rope_inv_freq(), after.rope_inv_freq())
    assert conversion_map(before) == conversion_map(after)
    assert before.hf.dtype == after.hf.dtype


@pytest.mark.parametrize("family", FAMILIES)
def test_any_layout_loads_the_same_bits(
    family: str, families: dict[str, Path], megatron_logits: Callable[[str], dict[str, Tensor]]
) -> None:
    """TP=2 x PP=2 saves the base in its own chunks, in float32; read back, they are the Hugging Face tensors."""
    megatron_logits(RESAVED_ON)
    weights = HfWeights(families[family] / "hf")
    resaved = TorchDistReader(families[family] / "resaved")
    assert resaved.tensors.keys() == TorchDistReader(checkpoint_dir(families[family] / "base")).tensors.keys()
    model = family_of(families[family] / "hf")
    for chunk in conversion_map(model):
        for key, tensor in chunk.split(resaved.read(chunk.key, chunk.offset, chunk.shape)).items():
            assert torch.equal(tensor, weights.read(key).float()), key
    embedding = resaved.read("embedding.word_embeddings.weight")
    assert embedding.shape[0] == model.hf.vocab_size + model.hf.vocab_size % 2
    assert not embedding[model.hf.vocab_size :].any()
