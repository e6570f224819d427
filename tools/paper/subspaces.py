"""How alike low-rank matrices are: canonical correlations of the spaces that their rows span.

The squares of the canonical correlations of two spaces of p and q dimensions are those of the singular values of
Q_i Q_j^T, Q holding an orthonormal basis in its rows. Their mean over min(p, q) is R^2_CCA (Kornblith et al. 2019,
arXiv 1905.00414), which Zhu et al. 2024 (arXiv 2402.16842) used on LoRA's A and B: 1 where one space contains the
other, 0 where they are orthogonal. Two independent spaces of which one is uniformly random in width w have
max(p, q) / w on average, exactly: E ||Q_i Q_j^T||^2 = p q / w.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from experiment import Run
from safetensors.torch import load_file
from torch import Tensor

from malora_dist.methods.initial import initial_parameter

#: A parameter's name in a kept adapter.
_NAME = re.compile(r"layers\.(?P<layer>\d+)\..*\.adapters\.(?P<projection>\w+)\.(?P<parameter>\w+)$")
#: Below so much of the largest singular value a direction is rounding: an expert without tokens has B = 0.
_NOTHING = 1e-6


class Site(NamedTuple):
    """Where an adapter is."""

    layer: int
    projection: str


class Factors(NamedTuple):
    """An adapter's matrices at one site, an expert each; LoRA is one expert.

    Attributes:
        down: A, or MALoRA's P_t S. [experts, r, n]
        start: the same before training.
        up: B, transposed. [experts, r, m]
        shared: the rows of S. [d, n]; None: every expert has its own A
    """

    down: Tensor
    start: Tensor
    up: Tensor
    shared: Tensor | None

    @property
    def start_left(self) -> Tensor:
        """The multiple of its start that is nearest to each A. [experts, 1, 1]"""
        products, squares = ((self.start * other).sum(dim=(1, 2), keepdim=True) for other in (self.down, self.start))
        return products / squares

    @property
    def learned(self) -> Tensor:
        """A without that. [experts, r, n]"""
        return self.down - self.start_left * self.start

    @property
    def learned_share(self) -> float:
        """Of the squares of A, mean over experts; weight decay alone leaves it at 0."""
        shares = self.learned.square().sum(dim=(1, 2)) / self.down.square().sum(dim=(1, 2))
        return float(shares.mean())


def read_factors(file: Path, run: Run) -> dict[Site, Factors]:
    """Of every site of a kept adapter; its start is drawn again, as a pure function of seed and site."""
    by_site: dict[Site, dict[str, Tensor]] = {}
    for name, value in load_file(file).items():
        found = _NAME.search(name)
        assert found is not None, name
        site = Site(int(found["layer"]), found["projection"])
        by_site.setdefault(site, {})[found["parameter"]] = value.double()
    method, base = run.config.declared, run.domain.measured
    factors = {}
    for site, trained in by_site.items():
        widths = base.widths[site.projection]
        started = {
            name: initial_parameter(method, name, *widths, run.seed, site.layer, site.projection).double()
            for name in trained
        }
        up = trained["B"].transpose(-1, -2).reshape(method.num_experts, -1, widths[1])
        factors[site] = Factors(_down(trained), _down(started), up, trained.get("S"))
    return factors


def _down(parameters: Mapping[str, Tensor]) -> Tensor:
    """A, or P_t S. [experts, r, n]"""
    if "S" in parameters:
        return parameters["P"] @ parameters["S"]
    a = parameters["A"]
    return a if a.dim() == 3 else a[None]


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
    """Singular values of matrices stacked on each other, over their root mean square, largest first. [experts * r]

    Orthogonal rows of one length give 1 throughout.

    Args:
        matrices: [experts, r, width]; the stack is no higher than wide.
    """
    sigma = torch.linalg.svdvals(matrices.flatten(0, 1))
    return sigma / sigma.square().mean().sqrt()
