"""The matrices of the adapters that a study has kept, and what of them was learned."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from experiment import Run
from safetensors.torch import load_file
from torch import Tensor

from malora_dist.methods.factors import two_factors
from malora_dist.methods.initial import initial_parameter

#: A parameter's name in a kept adapter.
_NAME = re.compile(r"layers\.(?P<layer>\d+)\..*\.adapters\.(?P<projection>\w+)\.(?P<parameter>\w+)$")


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
    matrices = two_factors(method)
    assert matrices is not None, "the studies compare LoRA, MoLoRA and MALoRA"
    factors = {}
    for site, trained in by_site.items():
        widths = base.widths[site.projection]
        started = {
            name: initial_parameter(method, name, *widths, run.seed, site.layer, site.projection) for name in trained
        }
        down, up = matrices.of(trained)
        factors[site] = Factors(down, matrices.of(started).down, up, trained.get("S"))
    return factors
