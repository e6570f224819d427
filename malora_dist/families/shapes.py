"""Shapes of released Llamas, for counting and for benchmarks: no weights, no files."""

from __future__ import annotations

import math
from typing import cast

from transformers import LlamaConfig

from malora_dist.errors import ConfigError
from malora_dist.families.base import FAMILIES, DecoderConfig
from malora_dist.families.conversion import conversion_map

#: {name: widths and numbers of its parts}; embeddings and output layer are apart in all of them.
SHAPES: dict[str, dict[str, int]] = {
    "llama2-7b": {"hidden": 4096, "layers": 32, "ffn": 11008, "heads": 32, "kv_heads": 32, "vocab": 32000},
    "llama3-8b": {"hidden": 4096, "layers": 32, "ffn": 14336, "heads": 32, "kv_heads": 8, "vocab": 128256},
}


def released_config(name: str) -> DecoderConfig:
    """The Hugging Face config of a released Llama, as far as it decides shapes.

    Raises:
        ConfigError: there is no such shape.
    """
    if name not in SHAPES:
        raise ConfigError("--shape", name, f"must be one of {', '.join(SHAPES)}", "use --hf-model for another model")
    shape = SHAPES[name]
    config = LlamaConfig(
        hidden_size=shape["hidden"],
        num_hidden_layers=shape["layers"],
        intermediate_size=shape["ffn"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        vocab_size=shape["vocab"],
        tie_word_embeddings=False,
    )
    return cast(DecoderConfig, config)


def base_parameters(hf: DecoderConfig) -> int:
    """Parameters of the base model, tied embeddings counted once."""
    return sum(math.prod(chunk.shape) for chunk in conversion_map(FAMILIES[hf.model_type](hf)))
