"""Layout, recompute and packing settings that cannot work: the key, its value, the rule, the cure."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig, MistralConfig, Qwen2Config

from malora_dist.config import Config
from malora_dist.config_sections import TaskConfig
from malora_dist.errors import ConfigError
from malora_dist.families.llama import Llama
from malora_dist.families.mistral import Mistral
from malora_dist.families.qwen2 import Qwen2

PP2 = {"pipeline_model_parallel_size": 2}


def config(**fields: Any) -> Config:
    return Config(pretrained_checkpoint="base", data=[TaskConfig(path="a.jsonl")], **fields)


@pytest.mark.parametrize(
    ("world_size", "fields", "expected"),
    [
        (1, {"virtual_pipeline_model_parallel_size": 0}, "virtual_pipeline_model_parallel_size=0: must be at least 1"),
        (
            1,
            {"virtual_pipeline_model_parallel_size": 2},
            "virtual_pipeline_model_parallel_size=2: needs pipeline_model_parallel_size above 1; set it to 1",
        ),
        (
            2,
            {**PP2, "virtual_pipeline_model_parallel_size": 2, "global_batch_size": 9},
            "global_batch_size=9: must be a multiple of micro_batch_size=1 times the data-parallel size 1 times "
            "pipeline_model_parallel_size=2, as stages are interleaved; a multiple of 2 works",
        ),
        (
            1,
            {"decoder_first_pipeline_num_layers": 3},
            "decoder_first_pipeline_num_layers=3: needs pipeline_model_parallel_size above 1; set it to 0",
        ),
        (
            2,
            {**PP2, "decoder_last_pipeline_num_layers": -1},
            "decoder_last_pipeline_num_layers=-1: must be at least",
        ),
        (
            2,
            {**PP2, "virtual_pipeline_model_parallel_size": 2, "decoder_last_pipeline_num_layers": 3},
            "decoder_last_pipeline_num_layers=3: must be divisible by virtual_pipeline_model_parallel_size=2; choose",
        ),
        (1, {"recompute_granularity": "all"}, "recompute_granularity='all': must be one of none, full, selective; ch"),
        (1, {"recompute_method": "some"}, "recompute_method='some': must be one of uniform, block; choose one of them"),
        (1, {"recompute_num_layers": 0}, "recompute_num_layers=0: must be at least 1; raise it"),
        (1, {"recompute_modules": ["moe"]}, "recompute_modules='moe': must be one of core_attn, mlp; remove it"),
        (
            1,
            {"recompute_granularity": "selective", "recompute_modules": []},
            "recompute_modules=[]: needs core_attn or mlp; name one or both",
        ),
        (1, {"expert_compute": "loop"}, "expert_compute='loop': must be one of auto, gated_block, grouped; choose"),
        (1, {"packing": True, "global_batch_size": 0}, "global_batch_size=0: must be at least 1; raise it"),
    ],
)
def test_config(world_size: int, fields: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(expected)}"):
        config(**fields).validate(world_size)


@pytest.mark.parametrize(
    ("layers", "fields", "expected"),
    [
        (
            3,
            PP2,
            "pipeline_model_parallel_size=2: cannot share the base's num_hidden_layers=3 equally: 2 stages; choose a "
            "divisor, or set decoder_first_pipeline_num_layers or decoder_last_pipeline_num_layers",
        ),
        (
            4,
            {**PP2, "decoder_last_pipeline_num_layers": 4},
            "pipeline_model_parallel_size=2: cannot share the base's num_hidden_layers=4 equally: 0 are left for 1 st",
        ),
        (
            4,
            {**PP2, "decoder_first_pipeline_num_layers": 1, "decoder_last_pipeline_num_layers": 2},
            "pipeline_model_parallel_size=2: cannot share the base's num_hidden_layers=4 equally: 1 are left for 0 st",
        ),
        (
            4,
            {**PP2, "virtual_pipeline_model_parallel_size": 4},
            "pipeline_model_parallel_size=2: cannot share the base's num_hidden_layers=4 equally: 2 stages of virtual_",
        ),
        (
            4,
            {**PP2, "recompute_granularity": "full", "recompute_num_layers": 3},
            "recompute_num_layers=3: must divide the 2 layers of every stage or chunk with recompute_method=uniform; s",
        ),
    ],
)
def test_base(layers: int, fields: dict[str, object], expected: str) -> None:
    """What only shows when the base is known."""
    from malora_dist.models.transformer_config import transformer_config

    topology = SimpleNamespace(tp_size=1, pp_size=2)
    with pytest.raises(ConfigError, match=f"^{re.escape(expected)}"):
        transformer_config(Llama(LlamaConfig(num_hidden_layers=layers)), topology, config(**fields))


@pytest.mark.parametrize(
    ("window_layers", "fields", "expected"),
    [(0, {}, None), (1, {"use_sliding_window": True}, 64), (2, {"use_sliding_window": True}, None)],
)
def test_the_window_of_a_qwen2(window_layers: int, fields: dict[str, Any], expected: int | None) -> None:
    """It holds with `use_sliding_window`, from layer max_window_layers on."""
    hf = Qwen2Config(num_hidden_layers=2, max_window_layers=window_layers, sliding_window=64, **fields)
    assert Qwen2(hf).attention_window == expected


def test_sequences_longer_than_the_window_of_the_attention() -> None:
    from malora_dist.models.transformer_config import transformer_config

    topology = SimpleNamespace(tp_size=1, pp_size=1, device=SimpleNamespace(type="cpu"))
    base = Mistral(MistralConfig(sliding_window=64))
    transformer_config(base, topology, config(seq_length=64))
    expected = (
        "seq_length=65: must be at most the base's sliding_window=64: attention here is to all tokens before; "
        "set it to 64 or less"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(expected)}$"):
        transformer_config(base, topology, config(seq_length=65))
