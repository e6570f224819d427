"""The comparison of tests/test_parity.py notices every wrong mark and every doubled or lost reduction.

A mark dropped where it belongs, or set where it does not, raises no error: it moves gradients, or
only their norm. Each is a run of a step on the smallest layout that can show it. The marks to break come from
the declarations: one parameter for every way to lie on the ranks.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from malora_dist.methods.base import METHODS
from tests.layouts import METHODS as COMPARED
from tests.layouts import find
from tests.test_parity import Bench, bench, compare_without_input  # noqa: F401 (bench is a fixture)

#: Of the axes that are sharded anywhere those that a parameter has tell how it lies: {those: (method, parameter)}.
SHARDED = ("expert", "in", "out")
KINDS: dict[tuple[str, ...], tuple[str, str]] = {
    tuple(axis for axis in SHARDED if axis in param.axes): (method, name)
    for method in sorted(COMPARED, key=lambda method: method == "malora")  # malora's where it has one
    for name, param in METHODS[method].parameters.items()
    if param.trained
}


def flips() -> Iterator[tuple[str, str, str]]:
    """(sabotage, method, layout) of every mark of every kind beside both styles of linear."""
    for method, name in KINDS.values():
        for style in ("column", "row"):
            for mark in ("sequence_parallel", "tensor_model_parallel"):
                yield f"flip {mark} {style} {name}", method, "TP 2"
            if METHODS[method].is_mixture():  # otherwise experts are not sharded, and both groups are the same
                yield f"flip allreduce {style} {name}", method, "EP 2"


CANARIES = [
    *flips(),
    ("second_reduction", "malora", "DP 4, EP 2"),
    ("expert_factor", "malora", "EP 2"),
    ("lost_output_gradient", "malora", "TP 2"),
    ("balance_after_gather", "malora", "TP 2"),
    ("balance_scaled_by 8", "malora", "1 process"),  # once per microbatch instead of once per step
    ("unsummed_norms", "dora", "TP 2"),
    ("stale_norms", "dora", "1 process"),
]


def travelling(method: str) -> list[str]:
    return ["dispatch=all_to_all"] if METHODS[method].is_mixture() else []


def test_every_way_to_lie_on_the_ranks_has_its_canaries() -> None:
    assert set(KINDS) == {("in",), ("out",), ("expert",), ("expert", "in"), ("expert", "out")}


@pytest.mark.parametrize(("sabotage", "method", "layout"), CANARIES)
def test_canary(sabotage: str, method: str, layout: str, bench: Bench) -> None:  # noqa: F811
    steps = 2 if sabotage == "stale_norms" else 1  # norms are stale from the second step on
    results = bench.run(find(layout), f"method={method}", extra=travelling(method), steps=steps, sabotage=sabotage)
    with pytest.raises(AssertionError):
        compare_without_input(*results)


@pytest.mark.parametrize(("method", "layout"), sorted({(method, layout) for _, method, layout in CANARIES}))
def test_nothing_is_noticed_without_sabotage(method: str, layout: str, bench: Bench) -> None:  # noqa: F811
    compare_without_input(*bench.run(find(layout), f"method={method}", extra=travelling(method), steps=2))
