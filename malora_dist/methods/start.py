"""Start values of the adapters, the same on every parallel layout.

Each tensor is drawn on the CPU from a generator keyed by the seed, the global layer number, the
projection, the parameter and (for experts) the expert number. A rank draws only its own experts
and slices its tensor-parallel shard out of the full tensor, so no layout changes the values.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from malora_dist.methods.spec import AdapterSpec


def keyed_generator(seed: int, *key: object) -> torch.Generator:
    """A CPU generator whose stream is a pure function of the seed and the key."""
    digest = hashlib.sha256("/".join(map(str, (seed, *key))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") & (2**63 - 1))


def _kaiming_uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Of a matrix: Kaiming-uniform with a = sqrt(5) as in PEFT's LoRA A, variance 1 / (3 fan_in)."""
    bound = 1.0 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _orthonormal_rows(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Of a matrix: rows orthonormal; with more rows than columns, columns orthonormal."""
    return torch.nn.init.orthogonal_(torch.empty(shape), generator=generator)


def initial_parameter(
    spec: AdapterSpec,
    name: str,
    in_features: int,
    out_features: int,
    seed: int,
    layer_number: int,
    projection: str,
    experts: Sequence[int] | None = None,
) -> Tensor:
    """Start value of one parameter, float32 on the CPU, full width.

    B starts at zero, so step 0 equals the base model. S_A's rows are orthonormal (entries of
    variance 1/n) and P_t is Kaiming-uniform in d (variance 1/(3d)), so the entries of P_t S_A
    have the variance 1/(3n) of LoRA's A.

    Args:
        layer_number: 0-based number of the layer in the whole model, not in a pipeline stage.
        projection: the adapter's name (``AdapterSpec.adapter_groups``).
        experts: expert numbers to draw, for the parameters that have an expert axis; None: all.
    """
    shape = spec.parameter_shape(name, in_features, out_features)
    key = (f"layers.{layer_number}", projection, name)
    if len(shape) == 2:
        if name == "B":
            return torch.zeros(shape)
        draw = _orthonormal_rows if name == "S" else _kaiming_uniform
        return draw(shape, keyed_generator(seed, *key))
    chosen = range(shape[0]) if experts is None else experts
    if name == "B":
        return torch.zeros(len(chosen), *shape[1:])
    return torch.stack([_kaiming_uniform(shape[1:], keyed_generator(seed, *key, e)) for e in chosen])
