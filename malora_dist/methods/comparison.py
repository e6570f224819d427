"""Adapters side by side on one base model: what each trains, and which ranks make them equally large."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

from malora_dist.errors import ConfigError
from malora_dist.methods.base import METHODS
from malora_dist.methods.budget import (
    LayerWidths,
    Width,
    adapter_parameters,
    largest,
    total,
    trainable_parameters,
    trained_share,
)
from malora_dist.methods.spec import AdapterSpec


class Base(NamedTuple):
    """What counting has to know of the frozen model."""

    widths: LayerWidths
    num_layers: int
    parameters: int


@dataclass(frozen=True)
class Candidate:
    """An adapter on a base, under the name it has in a table."""

    name: str
    spec: AdapterSpec
    base: Base

    def check(self) -> None:
        """Refuse what could not be trained on this base.

        Raises:
            ConfigError: naming key, value, rule and cure.
        """
        self.spec.validate_adapter()
        for projection in self.spec.projections:
            self.spec.declared.check_widths(projection, *self.base.widths[projection])

    @property
    def total(self) -> int:
        """Trainable parameters, routers included."""
        return total(self.spec, self.base.widths, self.base.num_layers)

    @property
    def figures(self) -> dict[str, Any]:
        """All that a table or a JSON file says of it."""
        widths, num_layers, base_parameters = self.base
        spec, trained = self.spec, trainable_parameters(self.spec, widths, num_layers)
        everything = adapter_parameters(spec, widths, num_layers)
        return {
            "name": self.name,
            "method": spec.method,
            "lora_rank": spec.lora_rank,
            "shared_dim": spec.shared_dim if spec.declared.uses("shared") else None,
            "scaling": spec.declared.scaling,
            "trained": trained,
            "frozen": {kind: count for kind, count in everything.items() if kind not in trained},
            "total": self.total,
            "of_base": self.total / base_parameters,
            "of_all": trained_share(spec, widths, num_layers, base_parameters),
        }


def as_large_as(reference: Candidate, method: str, width: Width = "lora_rank") -> Candidate:
    """Another method with the reference's settings, as large as it can be without training more parameters.

    Args:
        width: what is chosen. Methods without a shared subspace have no shared_dim; for them it is lora_rank anyway.

    Raises:
        ConfigError: the method cannot be that small, or not with these settings.
    """
    spec = dataclasses.replace(reference.spec, method=method, freeze=[])
    chosen: Width = width if spec.declared.uses("shared") else "lora_rank"
    spec = largest(spec, chosen, reference.base.widths, reference.total, reference.base.num_layers)
    candidate = Candidate(method, spec, reference.base)
    candidate.check()
    return candidate


def others_as_large_as(reference: Candidate, width: Width = "lora_rank") -> tuple[list[Candidate], list[str]]:
    """(every other method that can be as large as the reference, why the remaining ones cannot)."""
    found, left_out = [], []
    for method in METHODS:
        if method != reference.spec.method:
            try:
                found.append(as_large_as(reference, method, width))
            except ConfigError as error:
                left_out.append(f"{method} is left out: {error}")
    return found, left_out
