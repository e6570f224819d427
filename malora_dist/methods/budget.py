"""Trainable parameters of a method on a model, and the settings that reach a wanted saving."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from malora_dist.methods.spec import AdapterSpec

#: {projection: (in_features, out_features)} of one layer.
LayerWidths = Mapping[str, tuple[int, int]]


def trainable_parameters(spec: AdapterSpec, widths: LayerWidths, num_layers: int = 1) -> dict[str, int]:
    """Trainable parameters by kind (``router``, ``S``, ``A``, ``P``, ``B``), summed over the model."""
    return {k: n for k, n in adapter_parameters(spec, widths, num_layers).items() if k not in spec.frozen_names}


def adapter_parameters(spec: AdapterSpec, widths: LayerWidths, num_layers: int = 1) -> dict[str, int]:
    """Adapter parameters by kind, the frozen ones included, summed over the model."""
    return {
        name: num_layers
        * sum(
            math.prod(spec.parameter_shape(name, *widths[projection]))
            for _, group in spec.adapter_groups
            for projection in (group if name == "B" else group[:1])
        )
        for name in spec.parameter_names
    }


def saving_over_molora(spec: AdapterSpec, widths: LayerWidths) -> float:
    """1 - parameters(spec) / parameters(MoLoRA with the same N, r and targets), routers included."""
    molora = dataclasses.replace(AdapterSpec(**spec.adapter_fields()), method="molora")
    own, other = (sum(trainable_parameters(s, widths).values()) for s in (spec, molora))
    return 1.0 - own / other


def solve_shared_dim(spec: AdapterSpec, widths: LayerWidths, saving: float) -> int:
    """Largest shared_dim d that still saves at least ``saving`` over MoLoRA.

    Raises:
        ValueError: if not even d = 1 reaches it.
    """
    base = AdapterSpec(**{**spec.adapter_fields(), "method": "malora"})
    best = 0
    for d in range(1, base.num_lora_experts * base.lora_rank + 1):
        if saving_over_molora(dataclasses.replace(base, shared_dim=d), widths) < saving:
            break
        best = d
    if best == 0:
        raise ValueError(
            f"no shared_dim saves {saving:.1%} at rank_expansion={base.rank_expansion}: lower rank_expansion"
        )
    return best


def solve_rank_expansion(spec: AdapterSpec, widths: LayerWidths, saving: float) -> float:
    """Largest rank_expansion beta (r' whole) that still saves at least ``saving`` over MoLoRA.

    Raises:
        ValueError: if not even r' = 1 reaches it.
    """
    base = AdapterSpec(**{**spec.adapter_fields(), "method": "malora"})
    best = 0
    for rank in range(1, 4 * base.lora_rank + 1):
        candidate = dataclasses.replace(base, rank_expansion=rank / base.lora_rank)
        if saving_over_molora(candidate, widths) < saving:
            break
        best = rank
    if best == 0:
        raise ValueError(f"no rank_expansion saves {saving:.1%} at shared_dim={base.shared_dim}: lower shared_dim")
    return best / base.lora_rank
