"""Start values, the same on every parallel layout.

Each tensor is drawn on the CPU from a generator keyed by the seed, the global layer number, the
adapter, the parameter and (for experts) the expert number. A rank draws only its own experts
and slices its tensor-parallel shard out of the full tensor, so no layout changes the values.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Generator, Tensor


class Settings(Protocol):
    """What a method asks of the configuration (:class:`~malora_dist.methods.spec.AdapterSpec`)."""

    method: str
    lora_rank: int | None
    lora_alpha: float | None
    use_rslora: bool
    num_lora_experts: int
    topk: int
    shared_dim: int
    beta: float
    norm_topk_prob: bool
    aux_loss_coeff: float
    freeze: list[str]


def keyed_generator(seed: int, *key: object) -> Generator:
    """A CPU generator whose stream is a pure function of the seed and the key."""
    digest = hashlib.sha256("/".join(map(str, (seed, *key))).encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:8], "little") & (2**63 - 1))


class Draw(NamedTuple):
    """What a start is drawn from.

    Attributes:
        settings: of the adapter.
        widths: {axis: width} on the adapted projection.
        shape: of the parameter, or of one expert's slice of it.
        generator: keyed by seed, layer, adapter, parameter and expert.
    """

    settings: Settings
    widths: Mapping[str, int]
    shape: tuple[int, ...]
    generator: Generator


def zeros(draw: Draw) -> Tensor:
    """Zeros, for what makes the adapter's output zero at the start."""
    return torch.zeros(draw.shape)


def kaiming_uniform(draw: Draw) -> Tensor:
    """Of a matrix: Kaiming-uniform with a = sqrt(5) as PEFT's LoRA A, variance 1 / (3 fan_in)."""
    bound = 1.0 / math.sqrt(draw.shape[-1])
    return torch.empty(draw.shape).uniform_(-bound, bound, generator=draw.generator)


def orthonormal_columns(draw: Draw) -> Tensor:
    """Of a matrix no wider than high: orthonormal columns, uniformly distributed."""
    return torch.nn.init.orthogonal_(torch.empty(draw.shape), generator=draw.generator)


def left_factors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(U [d, d], Sigma [d]) of the cropped SVD U Sigma V of a wide matrix, largest singular value first; float64.

    From the eigenvectors of its small Gram matrix, which has the same U and Sigma^2. An SVD leaves the sign of each
    column of U open: here its largest entry is positive, so that every processor agrees.

    Args:
        matrix: [d, n], d <= n.
    """
    wide = matrix.double()
    squares, u = torch.linalg.eigh(wide @ wide.t())
    squares, u = squares.flip(0), u.flip(1)
    largest = u.gather(0, u.abs().argmax(dim=0, keepdim=True))
    return u * largest.sign(), squares.clamp(min=0.0).sqrt()
