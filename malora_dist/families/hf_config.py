"""Which Hugging Face configs are Llamas this project can hold, and their rotary frequencies."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from malora_dist.errors import CheckpointError

ROPE_TYPES = ("default", "linear", "llama3")

#: {field of config.json: (its only supported value, which is also what a missing field means, cure)}.
_FIXED_FIELDS: dict[str, tuple[Any, str]] = {
    "attention_bias": (False, "use a Llama without attention biases"),
    "mlp_bias": (False, "use a Llama without MLP biases"),
    "hidden_act": ("silu", "use a Llama with the SwiGLU of the original"),
    "pretraining_tp": (1, "set it to 1: it only changes how Hugging Face computes, not the weights"),
    "partial_rotary_factor": (1.0, "use a Llama that rotates the whole head"),
    "quantization_config": (None, "use the unquantised model"),
}


def read_llama_config(hf_dir: Path) -> LlamaConfig:
    """Read ``hf_dir/config.json``, in the form of transformers 5 or older, without network.

    Raises:
        CheckpointError: no such file, not JSON, not a Llama, or a Llama with a feature that the
            conversion or the model would have to drop.
    """
    file = Path(hf_dir) / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{hf_dir}: has no config.json; name the directory of a Hugging Face Llama")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file}: is not JSON ({error}); copy the file again") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file}: is not a JSON object; copy the file again")
    _check_is_llama(hf_dir, raw)
    for name, (supported, cure) in _FIXED_FIELDS.items():
        _require(hf_dir, name, raw.get(name, supported), supported, cure)
    _check_rope(hf_dir, raw)
    try:
        config = LlamaConfig.from_dict(raw)
    except (StrictDataclassError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{file}: transformers refuses it ({reason}); correct the field") from error
    if config.num_attention_heads % (config.num_key_value_heads or config.num_attention_heads):
        raise CheckpointError(
            f"{file}: num_key_value_heads={config.num_key_value_heads} must divide "
            f"num_attention_heads={config.num_attention_heads}; correct the file"
        )
    return config


def rope_inv_freq(config: LlamaConfig) -> Tensor:
    """Rotary frequencies as transformers computes them, float32 [head_dim / 2].

    Raises:
        CheckpointError: if the rope type also scales the attention, which this project does not do.
    """
    rope = LlamaRotaryEmbedding(config)
    if rope.attention_scaling != 1.0:
        raise CheckpointError(
            f"rope_parameters={config.rope_parameters!r}: scales attention by {rope.attention_scaling}, "
            f"which is not supported; use one of {', '.join(ROPE_TYPES)}"
        )
    return rope.inv_freq.detach().float()


def _check_is_llama(hf_dir: Path, raw: Mapping[str, Any]) -> None:
    cure = "only Llama models can be converted"
    _require(hf_dir, "model_type", raw.get("model_type"), "llama", cure)
    _require(hf_dir, "architectures", raw.get("architectures", ["LlamaForCausalLM"]), ["LlamaForCausalLM"], cure)


def _check_rope(hf_dir: Path, raw: Mapping[str, Any]) -> None:
    """Both spellings: transformers 5's ``rope_parameters`` and ``rope_scaling`` with ``rope_type`` or ``type``."""
    given = {name: raw[name] for name in ("rope_parameters", "rope_scaling") if raw.get(name)}
    if len(given) == 2:
        raise CheckpointError(
            f"{hf_dir}: config.json has both rope_parameters={raw['rope_parameters']!r} and "
            f"rope_scaling={raw['rope_scaling']!r}, of which each version of transformers reads one; remove one"
        )
    for name, rope in given.items():
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in ROPE_TYPES:
            raise CheckpointError(
                f"{hf_dir}: config.json has {name}.rope_type={rope_type!r}, must be one of {', '.join(ROPE_TYPES)}; "
                "use a model with one of these"
            )
        partial = rope.get("partial_rotary_factor", 1.0)
        _require(hf_dir, f"{name}.partial_rotary_factor", partial, 1.0, "use a Llama that rotates the whole head")


def _require(hf_dir: Path, name: str, value: object, supported: object, cure: str) -> None:
    if value != supported:
        raise CheckpointError(f"{hf_dir}: config.json has {name}={value!r}, must be {supported!r}; {cure}")
