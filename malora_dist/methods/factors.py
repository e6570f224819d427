"""A method's experts as products of two matrices, read off the declared axes: x -> up_t down_t x.

The parameters that have two widths are steps from one axis to another: MALoRA's are ``in -S-> shared -P-> rank -B->
out``. Where exactly one way leads from the input to the output, the steps up to the rank of an expert make its
down-projection (A_t, or P_t S_A), the others its up-projection (B_t).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from malora_dist.methods.base import Method

#: Of the small random instance that shows whether a method is what its axes say.
_ROWS = 3
_WIDTH = 8


class Factors(NamedTuple):
    """An adapter's matrices at one site; LoRA is one expert.

    Attributes:
        down: A, or MALoRA's P_t S. [experts, r, n]
        up: B, transposed. [experts, r, m]
    """

    down: Tensor
    up: Tensor


class Step(NamedTuple):
    """A parameter that leads from one axis to another."""

    name: str
    source: str
    target: str


@dataclass(frozen=True)
class TwoFactors:
    """How the parameters of a method make down- and up-projections.

    Attributes:
        down, up: the parameters in the order in which they act on x.
    """

    method: Method
    down: tuple[Step, ...]
    up: tuple[Step, ...]

    def of(self, parameters: Mapping[str, Tensor]) -> Factors:
        """The matrices of an adapter, in float64.

        Args:
            parameters: shaped as :meth:`Method.shape`.
        """
        down, up = (self._product(steps, parameters) for steps in (self.down, self.up))
        return Factors(down, up.transpose(-1, -2))

    def _product(self, steps: Sequence[Step], parameters: Mapping[str, Tensor]) -> Tensor:
        """[experts, width of the last step's target, width of the first one's source]"""
        matrix: Tensor | None = None
        for step in steps:
            param, value = self.method.parameters[step.name], parameters[step.name].double()
            axes = [axis for axis in param.axes if axis != "expert"]
            value = value if axes == [step.target, step.source] else value.transpose(-1, -2)
            matrix = value if matrix is None else value @ matrix
        assert matrix is not None, "a way has steps on both sides of the rank"
        return matrix.expand(self.method.num_experts, *matrix.shape[-2:])

    def is_shared(self, steps: Sequence[Step]) -> bool:
        """Whether all experts have the same matrix by declaration."""
        return not any(self.method.parameters[step.name].is_expert for step in steps)

    def common_axis(self, steps: Sequence[Step]) -> str | None:
        """The narrow axis that all experts share, as the rows of MALoRA's P_t S lie in those of S; None: none does.

        Args:
            steps: from the outer side inwards.
        """
        outer = next((i for i, step in enumerate(steps) if self.method.parameters[step.name].is_expert), len(steps))
        if outer in (0, len(steps)):
            return None
        return ({steps[outer - 1].source, steps[outer - 1].target} - {"in", "out"}).pop()


def two_factors(method: Method) -> TwoFactors | None:
    """How a method's parameters make two matrices; None: its experts are not such products."""
    ways = list(_ways(method, "in", ()))
    if len(ways) != 1 or len(ways[0]) < 2:
        return None
    (way,) = ways
    targets = [step.target for step in way[:-1]]
    cut = targets.index("rank") + 1 if "rank" in targets else len(targets)
    found = TwoFactors(method, way[:cut], way[cut:])
    return found if _computes(method, found) else None


def _ways(method: Method, axis: str, taken: tuple[Step, ...]) -> Iterator[tuple[Step, ...]]:
    """All ways from an axis to the output that use no parameter twice."""
    if axis == "out":
        yield taken
        return
    for name, param in method.parameters.items():
        ends = [end for end in param.axes if end != "expert"]
        if len(ends) == 2 and axis in ends and "logit" not in ends and name not in (step.name for step in taken):
            target = ends[1 - ends.index(axis)]
            yield from _ways(method, target, (*taken, Step(name, axis, target)))


def _computes(method: Method, found: TwoFactors) -> bool:
    """Whether the method's own functions do what the matrices say: on random numbers, as a tanh has no axis."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) / math.sqrt(shape[-1])

    p = {name: draw(*method.shape(name, _WIDTH, _WIDTH)) for name in method.parameters}
    x_TI, factors = draw(_ROWS, _WIDTH), found.of(p)
    z_TD = method.project(p, x_TI)
    for expert, (down, up) in enumerate(zip(factors.down, factors.up, strict=True)):
        own = {name: p[name][expert] if param.is_expert else p[name] for name, param in method.parameters.items()}
        if not torch.allclose(method.combine(p, method.expert(own, z_TD)), x_TI @ down.t() @ up):
            return False
    return True


def product_norms(factors: Factors) -> Tensor:
    """||up_t down_t|| (Frobenius) of each expert, without the [m, n] product. [experts]"""
    grams = (factors.down @ factors.down.mT) * (factors.up @ factors.up.mT)
    return grams.sum(dim=(-1, -2)).clamp(min=0).sqrt()
