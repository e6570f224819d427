"""What the weights alone tell of the experts: how alike they are, their spectra, and how much each adds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from malora_dist.inspection.source import Adapter
from malora_dist.inspection.subspaces import basis, overlap, spectrum
from malora_dist.methods.factors import Step, TwoFactors, product_norms, two_factors

#: Shows how far a loop over layers and projections has come.
Track = Callable[[Sequence[tuple[int, int]]], Iterable[tuple[int, int]]]


class Likeness(NamedTuple):
    """How alike the experts' matrices of one side (down or up) are.

    Attributes:
        pairs: R^2_CCA of every two experts; NaN where one is zero. [layers, projections, N, N]
        by_chance: that of random spaces. [layers, projections]
        within: that of random spaces in the subspace which the experts share by declaration; None: they share none.
    """

    pairs: np.ndarray
    by_chance: np.ndarray
    within: float | None

    @property
    def means(self) -> np.ndarray:
        """Over all pairs. [layers, projections]"""
        return mean_of(self.pairs[..., *np.triu_indices(self.pairs.shape[-1], k=1)], axis=-1)


@dataclass(frozen=True)
class Geometry:
    """Of all sites.

    Attributes:
        likeness: {"down" or "up": ...}; a side is left out where there is nothing to compare.
        left_out: {side: why}.
        spectra: {side: {projection: singular values of the stacked experts, mean over the layers}}.
        norms: ||s B_t A_t|| (Frobenius) of each expert. [layers, projections, N]
    """

    likeness: dict[str, Likeness]
    left_out: dict[str, str]
    spectra: dict[str, dict[str, np.ndarray]]
    norms: np.ndarray


def mean_of(values: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    """Mean over what is not NaN; NaN where nothing is left."""
    count = np.isfinite(values).sum(axis=axis)
    return np.where(count > 0, np.nansum(values, axis=axis) / np.maximum(count, 1), np.nan)


def geometry_of(adapter: Adapter, track: Track = iter) -> Geometry | None:
    """All of it; None: the method's experts are not products of two matrices."""
    factors = two_factors(adapter.method)
    if factors is None:
        return None
    count = adapter.method.num_experts
    left_out = _left_out(factors)
    pairs = {side: adapter.per_site(count, count) for side in ("down", "up") if side not in left_out}
    chance = {side: adapter.per_site() for side in pairs}
    sigma: dict[str, dict[str, list[Tensor]]] = {side: {p: [] for p in adapter.spec.projections} for side in _SIDES}
    norms = adapter.per_site(count)
    sites = list(product(range(adapter.num_layers), range(len(adapter.spec.projections))))
    for site in track(sites):
        layer, projection = site[0], adapter.spec.projections[site[1]]
        matrices = factors.of(adapter.parameters(layer, projection))
        norms[site] = adapter.method.scaling * product_norms(matrices).numpy()
        for side in _SIDES:
            stack = getattr(matrices, side)
            sigma[side][projection].append(spectrum(stack[:1] if factors.is_shared(getattr(factors, side)) else stack))
            if side in pairs:
                pairs[side][site], chance[side][site] = _compare(stack)
    return Geometry(
        likeness={side: Likeness(pairs[side], chance[side], _within(adapter, factors, side)) for side in pairs},
        left_out=left_out,
        spectra={
            side: {p: mean_of(torch.stack(rows).numpy(), axis=0) for p, rows in by_projection.items()}
            for side, by_projection in sigma.items()
        },
        norms=norms,
    )


_SIDES = ("down", "up")


def _left_out(factors: TwoFactors) -> dict[str, str]:
    method = factors.method
    if method.num_experts == 1:
        return dict.fromkeys(_SIDES, f"{method.settings.method} has one expert, so there are no two to compare")
    reason = f"all experts of {method.settings.method} share one {{}}-projection"
    return {side: reason.format(side) for side in _SIDES if factors.is_shared(getattr(factors, side))}


def _within(adapter: Adapter, factors: TwoFactors, side: str) -> float | None:
    """r / d of MALoRA's down-projections."""
    steps: tuple[Step, ...] = factors.down if side == "down" else tuple(reversed(factors.up))
    axis = factors.common_axis(steps)
    if axis is None:
        return None
    widths = adapter.method.widths(*next(iter(adapter.widths.values())))
    return min(1.0, widths["rank"] / widths[axis])


def _compare(matrices: Tensor) -> tuple[np.ndarray, float]:
    """(R^2_CCA of every two [N, N], that of random spaces) of experts' matrices [N, r, width]."""
    bases = [basis(matrix) for matrix in matrices]
    found = np.full((len(bases), len(bases)), np.nan)
    chances = []
    for i, one in enumerate(bases):
        found[i, i] = 1.0 if len(one) else np.nan
    for i, j in combinations(range(len(bases)), 2):
        found[i, j] = found[j, i] = (both := overlap(bases[i], bases[j])).found
        chances.append(both.by_chance)
    return found, float(mean_of(np.array(chances), axis=0))
