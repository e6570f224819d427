"""What one family of decoder models declares, and which families there are.

A family is a class in a file of its own: which Hugging Face configs it accepts, how its tensors are
called on both sides, and what megatron's TransformerConfig says of its layers. malora_dist/models/ makes
the model of it, ``conversion.py`` its checkpoint. Nothing here imports megatron, which takes seconds.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, cast

from torch import Tensor
from transformers import PreTrainedConfig

from malora_dist.errors import CheckpointError, shown
from malora_dist.files import foreign_reader, is_regular_file, read_json_object
from malora_dist.registry import Registry


class DecoderConfig(Protocol):
    """What the Hugging Face configs of all families have, under transformers' names and filled in by it."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope_parameters: Any
    sliding_window: int | None  # this and the next only where a family has them
    layer_types: Sequence[str]


class Row(NamedTuple):
    """One line of a family's table: a megatron tensor and the Hugging Face tensors fused into it.

    Attributes:
        megatron: its name in the model, or in a layer.
        hf: {name in the model, or in a layer: widths of its axes}, in fused order. Widths: h hidden,
            d one head, q all query heads, k all key (or value) heads, f MLP, v vocabulary.
        by_query_group: the rows are interleaved by query group, [q heads of the group | k | v], instead
            of one tensor after the other.
    """

    megatron: str
    hf: dict[str, str]
    by_query_group: bool = False


class Family(ABC):
    """A model by its Hugging Face config, read as one of a family; subclasses declare the family.

    Attributes:
        name: what messages call a model of the family.
        architecture: in its config.json.
        config_class, rotary_class: transformers' classes.
        rope_types: those that are supported.
        fixed_fields: {field of config.json: (its only supported value, which is also what a missing
            field means, cure)}.
        embedding_key, output_key: Hugging Face's names of both ends of the model.
        model_rows, layer_rows: the table of tensors.
        derived_keys: matches tensors that some files hold although they follow from the config.
        hf: the model's config.
    """

    name: ClassVar[str]
    architecture: ClassVar[str]
    config_class: ClassVar[type[PreTrainedConfig]]
    rotary_class: ClassVar[Any]
    rope_types: ClassVar[tuple[str, ...]]
    fixed_fields: ClassVar[Mapping[str, tuple[Any, str]]]
    embedding_key: ClassVar[str]
    output_key: ClassVar[str]
    model_rows: ClassVar[tuple[Row, ...]]
    layer_rows: ClassVar[tuple[Row, ...]]
    derived_keys: ClassVar[re.Pattern[str]]

    def __init__(self, hf: DecoderConfig) -> None:
        self.hf = hf

    @abstractmethod
    def transformer_fields(self) -> dict[str, Any]:
        """The fields of megatron's TransformerConfig in which families differ."""

    @property
    def attention_window(self) -> int | None:
        """How many tokens, itself included, a token may see in some layer; None: all before it."""
        return None

    def rope_inv_freq(self) -> Tensor:
        """Rotary frequencies as transformers computes them, float32 [head_dim / 2].

        Raises:
            CheckpointError: if the rope type also scales the attention, which this project does not do.
        """
        with foreign_reader(f"rope_parameters={self.hf.rope_parameters!r}", "correct config.json"):
            rope = self.rotary_class(self.hf)
        if rope.attention_scaling != 1.0:
            raise CheckpointError(
                f"rope_parameters={self.hf.rope_parameters!r}: scales attention by {rope.attention_scaling}, "
                f"which is not supported; use one of {', '.join(self.rope_types)}"
            )
        inv_freq: Tensor = rope.inv_freq
        if not inv_freq.isfinite().all():
            raise CheckpointError(
                f"rope_parameters={self.hf.rope_parameters!r}: gives infinite frequencies; correct config.json"
            )
        return inv_freq.detach().float()

    @classmethod
    def check(cls, hf_dir: Path, raw: Mapping[str, Any]) -> None:
        """Refuse the content of a config.json with a feature that conversion or model would have to drop.

        Raises:
            CheckpointError: naming the field.
        """
        expected = [cls.architecture]
        cure = f"only {cls.name} models can be converted"
        _require(hf_dir, "architectures", raw.get("architectures", expected), expected, cure)
        for field, (supported, cure) in cls.fixed_fields.items():
            _require(hf_dir, field, raw.get(field, supported), supported, cure)
        _check_rope(hf_dir, raw, cls)


#: Sizes of a model and what each lies below; more layers than that would keep a check busy for hours.
_LIMITS = {
    "hidden_size": 2**31, "intermediate_size": 2**31, "vocab_size": 2**31, "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16, "head_dim": 2**16, "num_hidden_layers": 2**16,
}  # fmt: skip
FAMILIES: Registry[Family] = Registry("malora_dist.families", key="model_type")
#: Class decorator: models whose config.json has this ``model_type`` are read as one of the family.
register = FAMILIES.register


def family_of(hf_dir: Path) -> Family:
    """Read ``hf_dir/config.json``, in the form of transformers 5 or older, without network.

    Raises:
        CheckpointError: no such file, not JSON, not a model of a known family, or a model with a feature
            that the conversion or the model would have to drop.
    """
    file = Path(hf_dir) / "config.json"
    names = ", ".join(family.name for family in FAMILIES.values())
    if not is_regular_file(file):
        raise CheckpointError(f"{hf_dir}: has no config.json; name the directory of a Hugging Face model: {names}")
    raw = read_json_object(file, CheckpointError, "copy the file again")
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(
            f"{hf_dir}: config.json has model_type={shown(model_type)}, must be one of {', '.join(FAMILIES)}; "
            f"use a model of one of these families: {names}"
        )
    family = FAMILIES[model_type]
    family.check(hf_dir, raw)
    model = family(_parse(file, raw, family.config_class))
    window = model.attention_window
    if window is not None and window < 1:
        raise CheckpointError(f"{file}: sliding_window={window}, must be null or at least 1; correct it")
    return model


def projection_widths(hf: DecoderConfig) -> dict[str, tuple[int, int]]:
    """Full (in_features, out_features) of the seven projections of a layer."""
    h, f = hf.hidden_size, hf.intermediate_size
    q, kv = hf.num_attention_heads * hf.head_dim, hf.num_key_value_heads * hf.head_dim
    return {
        "q_proj": (h, q), "k_proj": (h, kv), "v_proj": (h, kv), "o_proj": (q, h),
        "gate_proj": (h, f), "up_proj": (h, f), "down_proj": (f, h),
    }  # fmt: skip


def _parse(file: Path, raw: Mapping[str, Any], config_class: type[PreTrainedConfig]) -> DecoderConfig:
    with foreign_reader(file, "correct the field", "transformers refuses it"):
        hf = cast(DecoderConfig, config_class.from_dict(dict(raw)))
        if not hasattr(hf, "head_dim"):  # configs without that field mean this
            hf.head_dim = hf.hidden_size // hf.num_attention_heads
    _check_sizes(file, hf)
    if hf.num_key_value_heads < 1 or hf.num_attention_heads % hf.num_key_value_heads:
        raise CheckpointError(
            f"{file}: num_key_value_heads={hf.num_key_value_heads} must divide "
            f"num_attention_heads={hf.num_attention_heads}; correct the file"
        )
    return hf


def _check_sizes(file: Path, hf: DecoderConfig) -> None:
    """transformers checks types only, and not those of all fields."""
    for name, limit in _LIMITS.items():
        value = getattr(hf, name)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < limit:
            raise CheckpointError(f"{file}: {name}={shown(value)}, must be a whole number in [1, {limit}); correct it")
    if not isinstance(hf.rms_norm_eps, float) or not 0 <= hf.rms_norm_eps < 1:
        raise CheckpointError(f"{file}: rms_norm_eps={shown(hf.rms_norm_eps)}, must be a number in [0, 1); correct it")


def _check_rope(hf_dir: Path, raw: Mapping[str, Any], family: type[Family]) -> None:
    """Both spellings: transformers 5's ``rope_parameters`` and ``rope_scaling`` with ``rope_type`` or ``type``."""
    given = {name: raw[name] for name in ("rope_parameters", "rope_scaling") if raw.get(name)}
    if len(given) == 2:
        raise CheckpointError(
            f"{hf_dir}: config.json has both rope_parameters={raw['rope_parameters']!r} and "
            f"rope_scaling={raw['rope_scaling']!r}, of which each version of transformers reads one; remove one"
        )
    for name, rope in given.items():
        if not isinstance(rope, dict):
            raise CheckpointError(f"{hf_dir}: config.json has {name}={shown(rope)}, must be an object; correct it")
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in family.rope_types:
            raise CheckpointError(
                f"{hf_dir}: config.json has {name}.rope_type={rope_type!r}, must be one of "
                f"{', '.join(family.rope_types)}; use a model with one of these"
            )
        partial = rope.get("partial_rotary_factor", 1.0)
        cure = f"use a {family.name} that rotates the whole head"
        _require(hf_dir, f"{name}.partial_rotary_factor", partial, 1.0, cure)


def _require(hf_dir: Path, name: str, value: object, supported: object, cure: str) -> None:
    if value != supported:
        raise CheckpointError(f"{hf_dir}: config.json has {name}={shown(value)}, must be {supported!r}; {cure}")
