"""layers/elementwise.py against megatron-core's and torch's own operations: output, gradient, what is kept."""

from __future__ import annotations

import pytest
import torch

from tests.workers import WorkerPool

#: float64: only another formula can differ. bfloat16: a few roundings of 2^-8, which fall elsewhere.
TOLERANCES = {torch.float64: 1e-12, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_same_as_the_unfused_operations(workers: WorkerPool, dtype: torch.dtype) -> None:
    (results,) = workers.run("jobs_elementwise:against_megatron", 1, dtype=dtype)
    for ours, reference, _ in results.values():
        for own, expected in zip(ours, reference, strict=True):
            tolerance = TOLERANCES[dtype] * float(expected.abs().max())
            torch.testing.assert_close(own, expected, rtol=0.0, atol=tolerance)


def test_only_the_input_and_what_is_small_are_kept(workers: WorkerPool) -> None:
    (results,) = workers.run("jobs_elementwise:against_megatron", 1, dtype=torch.float64)
    assert results["rms_norm"][2] == 5 * 2 * 24 + 24 + 5 * 2  # besides x the weight and a number per token
    assert results["swiglu"][2] == 5 * 2 * 24
    assert results["rotate"][2] == 2 * 5 * 8
