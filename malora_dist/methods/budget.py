"""Trainable parameters of a method on a model, the paper's rank rule, and settings that meet a budget."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

from malora_dist.errors import ConfigError
from malora_dist.methods.spec import AdapterSpec

#: A width to choose for a budget.
Width = Literal["lora_rank", "shared_dim"]
#: Where the search for a width gives up.
_WIDEST = 2**24
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


def trained_share(spec: AdapterSpec, widths: LayerWidths, num_layers: int, base_parameters: int) -> float:
    """Trainable parameters over all parameters, base and frozen ones included: what PEFT prints and the paper gives."""
    adapter = sum(adapter_parameters(spec, widths, num_layers).values())
    return total(spec, widths, num_layers) / (base_parameters + adapter)


class Ranks(NamedTuple):
    """MALoRA's two widths."""

    shared_dim: int
    lora_rank: int


def rank_rule(molora_rank: int, num_experts: int, share: float) -> Ranks:
    """The paper's rule (section 3.3): MALoRA of about as many trainable parameters as MoLoRA of rank r.

    d = lambda r N and r_bar = r + (1 - lambda) r, both at least 1.

    Args:
        share: lambda, in (0, 1].

    Raises:
        ValueError: share is out of range.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share} must lie in (0, 1]")
    shared_dim = round(share * molora_rank * num_experts)
    return Ranks(max(1, shared_dim), max(1, round((2 - share) * molora_rank)))


def largest(spec: AdapterSpec, field: Width, widths: LayerWidths, budget: int, num_layers: int = 1) -> AdapterSpec:
    """The spec with the largest value of one of its widths that stays within a budget.

    Args:
        field: the width; with lora_rank the scaling s stays what it is.
        budget: trainable parameters, routers included.

    Raises:
        ConfigError: even 1 is too much, or the method has no such width.
    """

    def fits(value: int) -> bool:
        return total(_with_width(spec, field, value), widths, num_layers) <= budget

    if not fits(1):
        rule = f"is too much for method={spec.method} within {budget:,} parameters"
        raise ConfigError(field, 1, rule, "raise the budget or adapt fewer target_modules")
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
        if high > _WIDEST:
            raise ConfigError(field, 1, f"does not change the size of method={spec.method}", "solve lora_rank instead")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return _with_width(spec, field, low)


def _with_width(spec: AdapterSpec, field: Width, value: int) -> AdapterSpec:
    """The spec with another width and the same scaling s."""
    if field == "shared_dim":
        return dataclasses.replace(spec, shared_dim=value)
    divisor = math.sqrt(value) if spec.use_rslora else value
    return dataclasses.replace(spec, lora_rank=value, lora_alpha=spec.declared.scaling * divisor)
