"""Exchanges on handmade routing against the dense sum: values and gradients, uneven and empty ranks.

float64; tolerance 1e-12, as only the order of summation differs.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from malora_dist.errors import BackendUnavailableError
from malora_dist.exchange.all_to_all import expected_ranks
from malora_dist.exchange.base import Site
from malora_dist.exchange.fastmoe import load_fmoe_functions
from malora_dist.exchange.plan import cheapest_exchange
from malora_dist.methods.spec import AdapterSpec
from tests.workers import WorkerPool

EXPERTS, SENT, RETURNED = 4, 3, 5

#: Experts of each rank's tokens [T, K], by case; two ranks hold experts (0, 1) and (2, 3).
CASES: dict[str, list[list[list[int]]]] = {
    "mixed": [[[0, 2], [1, 3], [3, 0]], [[2, 3], [0, 1]]],
    "all on one rank": [[[0, 1], [1, 0], [0, 1]], [[1, 0], [0, 1]]],
    "both experts on one rank, sent once": [[[2, 3], [3, 2]], [[2, 3], [3, 2]]],
    "a rank without tokens": [[[0, 2], [1, 3], [3, 0], [2, 1]], []],
    "top-1": [[[3], [3], [0]], [[2]]],
}  # fmt: skip


def inputs(case: str) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    g = torch.Generator().manual_seed(0)
    topk = len(CASES[case][0][0])
    experts = [torch.tensor(e, dtype=torch.int64).view(-1, topk) for e in CASES[case]]
    z = [torch.randn(len(e), SENT, dtype=torch.float64, generator=g) for e in experts]
    gates = [torch.rand(len(e), topk, dtype=torch.float64, generator=g) for e in experts]
    return z, experts, gates, torch.randn(EXPERTS, SENT, RETURNED, dtype=torch.float64, generator=g)


def expected(case: str) -> dict[str, list[Tensor] | Tensor]:
    """Every token times the gate-weighted sum of its experts' matrices, on one process."""
    z, experts, gates, weights = inputs(case)
    for tensor in (*z, *gates, weights):
        tensor.requires_grad_()
    ys = [torch.einsum("tz,tkzm,tk->tm", a, weights[e], g) for a, e, g in zip(z, experts, gates, strict=True)]
    sum(y.square().sum() for y in ys).backward()  # type: ignore[union-attr]
    assert weights.grad is not None
    return {"y": ys, "z": [t.grad for t in z], "gates": [t.grad for t in gates], "weights": weights.grad}  # type: ignore[misc]


@pytest.mark.parametrize("dispatch", ["all_to_all", "fastmoe"])
@pytest.mark.parametrize("case", CASES)
def test_two_ranks(case: str, dispatch: str, workers: WorkerPool) -> None:
    if dispatch == "fastmoe" and case == "a rank without tokens":
        pytest.skip("untested upstream; the trainer never sends an empty batch")
    z, experts, gates, weights = inputs(case)
    results = workers.run(
        "dispatch_and_combine",
        2,
        dispatch=dispatch,
        num_experts=EXPERTS,
        z=z,
        experts=experts,
        gates=gates,
        weights=weights,
    )
    want = expected(case)
    for rank, got in enumerate(results):
        for what in ("y", "z", "gates"):
            torch.testing.assert_close(got[what], want[what][rank], rtol=1e-12, atol=1e-12)
        half = slice(rank * EXPERTS // 2, (rank + 1) * EXPERTS // 2)
        torch.testing.assert_close(got["weights"], want["weights"][half], rtol=1e-12, atol=1e-12)
    if dispatch == "all_to_all":  # one row per (token, rank)
        ranks_wanted = [{(t, e // 2) for t, row in enumerate(rows) for e in row} for rows in CASES[case]]
        for rank, got in enumerate(results):
            assert int(got["rows"]) == sum(r == rank for wanted in ranks_wanted for _, r in wanted)


@pytest.mark.parametrize("dispatch", ["local", "all_to_all", "fastmoe"])
def test_one_rank(dispatch: str, workers: WorkerPool) -> None:
    z, experts, gates, weights = (x[:1] if isinstance(x, list) else x for x in inputs("mixed"))
    (got,) = workers.run(
        "dispatch_and_combine",
        1,
        dispatch=dispatch,
        num_experts=EXPERTS,
        z=z,
        experts=experts,
        gates=gates,
        weights=weights,
    )
    y = torch.einsum("tz,tkzm,tk->tm", z[0], weights[experts[0]], gates[0])
    torch.testing.assert_close(got["y"], y, rtol=1e-12, atol=1e-12)


def test_rows_travel_behind_the_frozen_gemm_forward_and_backward(workers: WorkerPool) -> None:
    [(forward, backward)] = workers.run("order_of_work", 1)
    assert forward == ["start", "gemm", "arrive"]
    assert backward == ["start", "gemm", "arrive"]


@pytest.mark.parametrize(
    ("num_experts", "tokens", "chosen"),
    [
        (8, 512, "gather_experts"),  # 96 x (32 + 4096) numbers once, against 512 x 2 x 4096
        (8, 16, "all_to_all"),  # a few tokens are less than the experts
        (64, 8192, "gather_experts"),
        (512, 8192, "all_to_all"),  # fewer bytes to gather, but copies larger than the frozen linear
    ],
)
def test_the_rule_of_auto(num_experts: int, tokens: int, chosen: str) -> None:
    """A square layer 4096 wide in bfloat16, EP 8."""
    method = AdapterSpec(num_lora_experts=num_experts).declared
    site = Site(method, 4096, 4096, "column", tensor_parallel=1, expert_parallel=8, tokens=tokens, itemsize=2)
    assert cheapest_exchange(site) == chosen


def test_expected_ranks() -> None:
    """All of them when every expert is chosen, topk / EP of them at most, one when there is one."""
    assert expected_ranks(8, 8, 4) == 4
    assert expected_ranks(8, 1, 4) == pytest.approx(1)
    assert expected_ranks(8, 2, 1) == 1
    assert expected_ranks(8, 2, 8) == pytest.approx(2)  # two experts never share a rank
    assert expected_ranks(4, 2, 2) == pytest.approx(2 * (1 - 1 / 6))


def test_fastmoe_on_a_cpu_names_the_cure() -> None:
    with pytest.raises(BackendUnavailableError, match="CUDA tensors only, not on cpu; use dispatch=all_to_all"):
        load_fmoe_functions(torch.device("cpu"), 2)


def test_fastmoe_without_fmoe_names_the_cure() -> None:
    try:
        import fmoe  # noqa: F401
    except ImportError:
        with pytest.raises(BackendUnavailableError, match="build it from source"):
            load_fmoe_functions(torch.device("cuda"), 2)
    else:
        pytest.skip("fmoe is installed here")
