"""Qwen3, dense."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from malora_dist.families.base import Row, register
from malora_dist.families.llama import Llama
from malora_dist.families.qwen2 import Qwen2


@register("qwen3")
class Qwen3(Qwen2):
    """A Qwen2 that norms the heads of queries and keys instead of adding biases."""

    name = "Qwen3"
    architecture = "Qwen3ForCausalLM"
    config_class = Qwen3Config
    rotary_class = Qwen3RotaryEmbedding
    fixed_fields: ClassVar[Mapping[str, tuple[Any, str]]] = {
        "attention_bias": (False, "use a Qwen3 without attention biases"),
        "hidden_act": ("silu", "use a Qwen3 with the SwiGLU of the original"),
        "partial_rotary_factor": (1.0, "use a Qwen3 that rotates the whole head"),
        "quantization_config": (None, "use the unquantised model"),
    }
    layer_rows = (
        *Llama.layer_rows,
        Row("self_attention.q_layernorm.weight", {"self_attn.q_norm.weight": "d"}),
        Row("self_attention.k_layernorm.weight", {"self_attn.k_norm.weight": "d"}),
    )

    def transformer_fields(self) -> dict[str, Any]:
        return {**super().transformer_fields(), "add_qkv_bias": False, "qk_layernorm": True}
