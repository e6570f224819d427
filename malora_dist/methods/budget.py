"""Trainable parameters of a method on a model, the paper's rank rule, and settings that meet a budget."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

from malora_dist.methods.spec import AdapterSpec

#: {projection: (in_features, out_features)} of one layer.
LayerWidths = Mapping[str, tuple[int, int]]


def adapter_parameters(spec: AdapterSpec, widths: LayerWidths, num_layers: int = 1) -> dict[str, int]:
    """Adapter parameters by name, the frozen ones included, summed over the model."""
    counts = dict.fromkeys(spec.declared.parameters, 0)
    for _, projections in spec.adapters:
        for name, served in spec.stored_parameters(projections).values():
            counts[name] += num_layers * math.prod(spec.declared.shape(name, *widths[served[0]]))
    return counts


def trainable_parameters(spec: AdapterSpec, widths: LayerWidths, num_layers: int = 1) -> dict[str, int]:
    """Trainable parameters by name, summed over the model."""
    counts = adapter_parameters(spec, widths, num_layers)
    return {name: count for name, count in counts.items() if spec.declared.is_trained(name)}


def total(spec: AdapterSpec, widths: LayerWidths, num_layers: int = 1, with_router: bool = True) -> int:
    """All trainable parameters, with or without the routers, which the paper leaves out of some comparisons."""
    counts = trainable_parameters(spec, widths, num_layers)
    return sum(count for name, count in counts.items() if with_router or name != "router")


class Ranks(NamedTuple):
    """MALoRA's two widths."""

    shared_dim: int
    lora_rank: int


def rank_rule(molora_rank: int, num_experts: int, share: float) -> Ranks:
    """The paper's rule (section 3.3): MALoRA of about as many trainable parameters as MoLoRA of rank r.

    d = lambda r N and r_bar = r + (1 - lambda) r.

    Args:
        share: lambda, in (0, 1].

    Raises:
        ValueError: share is out of range.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share} must lie in (0, 1]")
    return Ranks(round(share * molora_rank * num_experts), round((2 - share) * molora_rank))


def largest(spec: AdapterSpec, field: str, widths: LayerWidths, budget: int, num_layers: int = 1) -> AdapterSpec:
    """The spec with the largest value of one of its widths that stays within a budget.

    Args:
        field: ``lora_rank`` or ``shared_dim``; with lora_rank the scaling s stays what it is.
        budget: trainable parameters, routers included.

    Raises:
        ValueError: even 1 is too much.
    """
    scaling = spec.declared.alpha / spec.declared.rank

    def with_value(value: int) -> AdapterSpec:
        changes = {"lora_rank": value, "lora_alpha": scaling * value} if field == "lora_rank" else {field: value}
        return dataclasses.replace(spec, **changes)

    fits, exceeds = 0, 1
    while total(with_value(exceeds), widths, num_layers) <= budget:
        fits, exceeds = exceeds, 2 * exceeds
        if exceeds > 2**24:
            raise ValueError(f"method={spec.method} does not grow with {field}")
    while exceeds - fits > 1:
        middle = (fits + exceeds) // 2
        fits, exceeds = (middle, exceeds) if total(with_value(middle), widths, num_layers) <= budget else (fits, middle)
    if fits == 0:
        raise ValueError(f"{budget:,} parameters are too few for method={spec.method} even with {field}=1")
    return with_value(fits)
