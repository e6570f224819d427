"""Mistral 7B and what is built like it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import MistralConfig
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding

from malora_dist.families.base import register
from malora_dist.families.llama import Llama


@register("mistral")
class Mistral(Llama):
    """A Llama whose tokens may see only a window of those before them."""

    name = "Mistral"
    architecture = "MistralForCausalLM"
    config_class = MistralConfig
    rotary_class = MistralRotaryEmbedding
    fixed_fields: ClassVar[Mapping[str, tuple[Any, str]]] = {
        "hidden_act": ("silu", "use a Mistral with the SwiGLU of the original"),
        "partial_rotary_factor": (1.0, "use a Mistral that rotates the whole head"),
        "quantization_config": (None, "use the unquantised model"),
    }

    @property
    def attention_window(self) -> int | None:
        return self.hf.sliding_window
