"""Llama 2, 3, 3.1, 3.2, and what is built like them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from transformers import LlamaConfig, PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from malora_dist.families.base import Family, Row, register


@register("llama")
class Llama(Family):
    """RMSNorm, grouped queries, rotary positions, SwiGLU, no biases."""

    name = "Llama"
    architecture = "LlamaForCausalLM"
    config_class: ClassVar[type[PreTrainedConfig]] = LlamaConfig
    rotary_class: ClassVar[Any] = LlamaRotaryEmbedding
    rope_types = ("default", "linear", "llama3")
    fixed_fields: ClassVar[Mapping[str, tuple[Any, str]]] = {
        "attention_bias": (False, "use a Llama without attention biases"),
        "mlp_bias": (False, "use a Llama without MLP biases"),
        "hidden_act": ("silu", "use a Llama with the SwiGLU of the original"),
        "pretraining_tp": (1, "set it to 1: it only changes how Hugging Face computes, not the weights"),
        "partial_rotary_factor": (1.0, "use a Llama that rotates the whole head"),
        "quantization_config": (None, "use the unquantised model"),
    }

    embedding_key = "model.embed_tokens.weight"
    output_key = "lm_head.weight"
    model_rows: ClassVar[tuple[Row, ...]] = (
        Row("embedding.word_embeddings.weight", {embedding_key: "vh"}),
        Row("decoder.final_layernorm.weight", {"model.norm.weight": "h"}),
        Row("output_layer.weight", {output_key: "vh"}),
    )
    layer_rows: ClassVar[tuple[Row, ...]] = (
        Row("input_layernorm.weight", {"input_layernorm.weight": "h"}),
        Row(
            "self_attention.linear_qkv.weight",
            {"self_attn.q_proj.weight": "qh", "self_attn.k_proj.weight": "kh", "self_attn.v_proj.weight": "kh"},
            by_query_group=True,
        ),
        Row("self_attention.linear_proj.weight", {"self_attn.o_proj.weight": "hq"}),
        Row("pre_mlp_layernorm.weight", {"post_attention_layernorm.weight": "h"}),
        Row("mlp.linear_fc1.weight", {"mlp.gate_proj.weight": "fh", "mlp.up_proj.weight": "fh"}),
        Row("mlp.linear_fc2.weight", {"mlp.down_proj.weight": "hf"}),
    )
    #: Rotary frequencies, which old versions of transformers saved.
    derived_keys = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")

    def transformer_fields(self) -> dict[str, Any]:
        return {
            "normalization": "RMSNorm",
            "layernorm_epsilon": self.hf.rms_norm_eps,
            "gated_linear_unit": True,
            "activation_func": F.silu,
            "add_bias_linear": False,
        }
