"""Qwen2 and Qwen2.5, dense."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedConfig, Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from malora_dist.errors import CheckpointError, shown
from malora_dist.families.base import Row, register
from malora_dist.families.llama import Llama

_WHOLE = "full_attention"
_WINDOW = "sliding_attention"


@register("qwen2")
class Qwen2(Llama):
    """A Llama with biases on queries, keys and values; some layers may see only a window of the tokens before."""

    name = "Qwen2"
    architecture = "Qwen2ForCausalLM"
    config_class: ClassVar[type[PreTrainedConfig]] = Qwen2Config
    rotary_class: ClassVar[Any] = Qwen2RotaryEmbedding
    fixed_fields: ClassVar[Mapping[str, tuple[Any, str]]] = {
        "hidden_act": ("silu", "use a Qwen2 with the SwiGLU of the original"),
        "partial_rotary_factor": (1.0, "use a Qwen2 that rotates the whole head"),
        "quantization_config": (None, "use the unquantised model"),
    }
    layer_rows: ClassVar[tuple[Row, ...]] = (
        *Llama.layer_rows,
        Row(
            "self_attention.linear_qkv.bias",
            {"self_attn.q_proj.bias": "q", "self_attn.k_proj.bias": "k", "self_attn.v_proj.bias": "k"},
            by_query_group=True,
        ),
    )

    @classmethod
    def check(cls, hf_dir: Path, raw: Mapping[str, Any]) -> None:
        super().check(hf_dir, raw)
        kinds = raw.get("layer_types")
        if kinds is None:
            return
        if not isinstance(kinds, list) or any(kind not in (_WHOLE, _WINDOW) for kind in kinds):
            raise CheckpointError(
                f"{hf_dir}: config.json has layer_types={shown(kinds)}, must be a list of {_WHOLE} and {_WINDOW}; "
                f"use a {cls.name} with these"
            )

    @property
    def attention_window(self) -> int | None:
        """transformers takes ``sliding_window`` for null without ``use_sliding_window``."""
        return self.hf.sliding_window if _WINDOW in self.hf.layer_types else None

    def transformer_fields(self) -> dict[str, Any]:
        return {**super().transformer_fields(), "add_qkv_bias": True}
