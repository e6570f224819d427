"""How alike low-rank matrices are: canonical correlations of the spaces that their rows span.

The squares of the canonical correlations of two spaces of p and q dimensions are those of the singular values of
Q_i Q_j^T, Q holding an orthonormal basis in its rows. Their mean over min(p, q) is R^2_CCA (Kornblith et al. 2019,
arXiv 1905.00414), which Zhu et al. 2024 (arXiv 2402.16842) used on LoRA's A and B: 1 where one space contains the
other, 0 where they are orthogonal. Two independent spaces of which one is uniformly random in width w have
max(p, q) / w on average, exactly: E ||Q_i Q_j^T||^2 = p q / w.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

#: Below so much of the largest singular value a direction is rounding: an expert without tokens has B = 0.
_NOTHING = 1e-6


def basis(matrix: Tensor) -> Tensor:
    """Orthonormal rows that span those of a matrix. [rank, width]"""
    _, sigma, rows = torch.linalg.svd(matrix, full_matrices=False)
    return rows[sigma > _NOTHING * sigma[0]]


class Overlap(NamedTuple):
    """R^2_CCA of two spaces, and what it is on average if one of them is random; NaN where a space is empty."""

    found: float
    by_chance: float


def overlap(one: Tensor, other: Tensor, width: int | None = None) -> Overlap:
    """Of two spaces given by their bases, [p, w] and [q, w].

    Args:
        width: of the space in which the random one lies; None: w.
    """
    few, many = sorted((len(one), len(other)))
    if not few:
        return Overlap(math.nan, math.nan)
    return Overlap(float((one @ other.t()).square().sum()) / few, min(1.0, many / (width or one.shape[1])))


def spectrum(matrices: Tensor) -> Tensor:
    """Singular values of matrices stacked on each other, over their root mean square, largest first.

    Orthogonal rows of one length give 1 throughout; matrices of zeros NaN.

    Args:
        matrices: [experts, r, width]; there are as many values as the stack is high, or wide if that is less.
    """
    sigma = torch.linalg.svdvals(matrices.flatten(0, 1))
    return sigma / sigma.square().mean().sqrt()
