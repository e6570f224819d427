"""The map between a family's Hugging Face tensors and megatron-core's GPTModel checkpoint.

A megatron `torch_dist` checkpoint stacks the layers: one tensor per kind of weight with the layer
axis in front. One :class:`Chunk` is what one layer (or the model itself) contributes to one such
tensor, and which Hugging Face tensors are fused into it, as the rows of the family's table say.

Keys and shapes are those of ``GPTModel.sharded_state_dict()`` with equal layers; they do not
depend on the parallel layout. Tied embeddings are stored once: both ends of the model load
``embedding.word_embeddings.weight``.

Nothing here reads or writes files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from malora_dist.errors import CheckpointError
from malora_dist.families.base import Family, Row
from malora_dist.methods.spec import MEGATRON_LINEARS

#: Objects (empty without fp8) that megatron's linears ask for beside their weights, one per layer.
_EXTRA_STATES = tuple(
    f"decoder.layers.{'mlp' if linear.startswith('linear_fc') else 'self_attention'}.{linear}._extra_state"
    for linear in MEGATRON_LINEARS
)


@dataclass(frozen=True)
class Chunk:
    """What one layer, or the model itself, keeps in one tensor of the megatron checkpoint."""

    key: str
    layer: int | None  # None for a tensor without a layer axis
    num_layers: int
    hf_shapes: Mapping[str, tuple[int, ...]]  # {full Hugging Face key: shape}, in fused order
    groups: int  # how many runs of rows the fused tensors are interleaved in

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the chunk, with a layer axis of length 1 in front where there is one."""
        shapes = list(self.hf_shapes.values())
        fused = (sum(s[0] for s in shapes), *shapes[0][1:])
        return fused if self.layer is None else (1, *fused)

    @property
    def global_shape(self) -> tuple[int, ...]:
        """Shape of the whole stacked tensor."""
        return self.shape if self.layer is None else (self.num_layers, *self.shape[1:])

    @property
    def offset(self) -> tuple[int, ...]:
        """Where the chunk lies in the stacked tensor."""
        return (self.layer or 0, *(0 for _ in self.shape[1:]))

    def fuse(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The chunk, from the Hugging Face tensors named in `hf_shapes`; dtype and bits are kept."""
        parts = [tensors[key].unflatten(0, (self.groups, -1)) for key in self.hf_shapes]
        return torch.cat(parts, dim=1).reshape(self.shape)

    def split(self, chunk: Tensor) -> dict[str, Tensor]:
        """Inverse of :meth:`fuse`: contiguous tensors that share no memory."""
        rows = [shape[0] // self.groups for shape in self.hf_shapes.values()]
        fused = chunk if self.layer is None else chunk[0]
        parts = fused.unflatten(0, (self.groups, -1)).split(rows, dim=1)
        return {
            key: part.flatten(0, 1).clone(memory_format=torch.contiguous_format)
            for key, part in zip(self.hf_shapes, parts, strict=True)
        }


def conversion_map(family: Family) -> list[Chunk]:
    """All chunks of a model: the model's own first, then layer by layer."""
    hf = family.hf
    widths = {
        "h": hf.hidden_size,
        "d": hf.head_dim,
        "q": hf.num_attention_heads * hf.head_dim,
        "k": hf.num_key_value_heads * hf.head_dim,
        "f": hf.intermediate_size,
        "v": hf.vocab_size,
    }

    def chunk(row: Row, layer: int | None) -> Chunk:
        megatron_prefix, hf_prefix = ("", "") if layer is None else ("decoder.layers.", f"model.layers.{layer}.")
        return Chunk(
            key=megatron_prefix + row.megatron,
            layer=layer,
            num_layers=hf.num_hidden_layers,
            hf_shapes={hf_prefix + name: tuple(widths[axis] for axis in axes) for name, axes in row.hf.items()},
            groups=hf.num_key_value_heads if row.by_query_group else 1,
        )

    left_out = family.output_key if hf.tie_word_embeddings else None
    model = [chunk(row, None) for row in family.model_rows if left_out not in row.hf]
    return model + [chunk(row, i) for i in range(hf.num_hidden_layers) for row in family.layer_rows]


def extra_state_keys(num_layers: int) -> list[str]:
    """Unique keys of the empty objects that megatron's linears load beside their weights."""
    return [f"{key}/shard_{i}_{num_layers}" for i in range(num_layers) for key in _EXTRA_STATES]


def redundant_keys(family: Family, keys: Mapping[str, object]) -> list[str]:
    """Keys that carry nothing of their own: derived tensors and, with tied embeddings, the output layer's copy."""
    is_tied = family.hf.tie_word_embeddings
    return [k for k in keys if family.derived_keys.fullmatch(k) or (k == family.output_key and is_tied)]


def check_coverage(source: object, family: Family, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Every tensor of a Hugging Face model is converted, and every one needed is there.

    Args:
        source: what to name in errors, the model's directory.
        shapes: {Hugging Face key: shape} of all tensors in the model's files.

    Raises:
        CheckpointError: naming the first unknown key, missing key or wrong shape.
    """
    expected = {key: shape for chunk in conversion_map(family) for key, shape in chunk.hf_shapes.items()}
    for key in sorted(shapes.keys() - expected.keys() - set(redundant_keys(family, shapes))):
        raise CheckpointError(f"{source}: tensor {key!r} is not part of a {family.name} and would be lost; remove it")
    for key, shape in expected.items():
        if key not in shapes:
            raise CheckpointError(f"{source}: tensor {key!r} of shape {list(shape)} is missing; complete the model")
        if tuple(shapes[key]) != shape:
            raise CheckpointError(
                f"{source}: tensor {key!r} has shape {list(shapes[key])}, but config.json gives {list(shape)}; "
                "use the config.json that belongs to the weights"
            )
