"""The comparison of tests/test_parity.py notices every wrong mark and every doubled or lost reduction.

A mark dropped where it belongs, or set where it does not, raises no error: it moves gradients, or
only their norm. Each is a run of two steps on the smallest layout that can show it.
"""

from __future__ import annotations

import pytest

from tests.layouts import find
from tests.test_parity import Bench, bench, compare_without_input  # noqa: F401 (bench is a fixture)

#: sabotage: layout
CANARIES = {
    **{f"flip sequence_parallel column {kind}": "TP 2" for kind in ("router", "S", "P", "B")},
    **{f"flip sequence_parallel row {kind}": "TP 2" for kind in ("router", "S", "P", "B")},
    **{f"flip tensor_model_parallel column {kind}": "TP 2" for kind in ("router", "S", "P", "B")},
    **{f"flip tensor_model_parallel row {kind}": "TP 2" for kind in ("router", "S", "P", "B")},
    **{f"flip allreduce column {kind}": "EP 2" for kind in ("router", "S", "P", "B")},
    **{f"flip allreduce row {kind}": "EP 2" for kind in ("router", "S", "P", "B")},
    "second_reduction": "DP 4, EP 2",
    "expert_factor": "EP 2",
    "lost_output_gradient": "TP 2",
    "balance_after_gather": "TP 2",
    "balance_scaled_by 8": "1 process",  # once per microbatch instead of once per step
}


@pytest.mark.parametrize("sabotage", CANARIES)
def test_canary(sabotage: str, bench: Bench) -> None:  # noqa: F811
    extra = ["dispatch=all_to_all"]
    results = bench.run(find(CANARIES[sabotage]), "method=malora", extra=extra, steps=2, sabotage=sabotage)
    with pytest.raises(AssertionError):
        compare_without_input(*results)


@pytest.mark.parametrize("layout", sorted({*CANARIES.values()}))
def test_nothing_is_noticed_without_sabotage(layout: str, bench: Bench) -> None:  # noqa: F811
    compare_without_input(*bench.run(find(layout), "method=malora", extra=["dispatch=all_to_all"], steps=2))


@pytest.mark.parametrize("style", ["column", "row"])
@pytest.mark.parametrize("mark", ["sequence_parallel", "tensor_model_parallel"])
def test_canary_of_molora(mark: str, style: str, bench: Bench) -> None:  # noqa: F811
    """Its A_t is placed unlike MALoRA's P_t."""
    results = bench.run(find("TP 2"), "method=molora", steps=2, sabotage=f"flip {mark} {style} A")
    with pytest.raises(AssertionError):
        compare_without_input(*results)
