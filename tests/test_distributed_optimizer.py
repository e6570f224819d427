"""The distributed optimizer: another place for Adam's state, the same training."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.test_parity import assemble, close, overrides
from tests.workers import WorkerPool

SHARDED = "use_distributed_optimizer=true"
LAYOUTS = {
    "DP=2": (2, []),
    "EP=2": (2, ["expert_model_parallel_size=2"]),
    "TP=2": (2, ["tensor_model_parallel_size=2", "sequence_parallel=true"]),
    "DP=4, EP=2": (4, ["expert_model_parallel_size=2"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_is_the_same(layout: str, workers: WorkerPool, base_dir: Path, task_files: list[Path]) -> None:
    """Not bit by bit: the gradient norm adds the same squares in another order, and clipping depends on it."""
    world_size, parallel = LAYOUTS[layout]
    settings = overrides(base_dir, task_files, *parallel)
    whole = workers.run("train_and_record", world_size, overrides=settings, steps=3)
    sharded = workers.run("train_and_record", world_size, overrides=[*settings, SHARDED], steps=3)
    for got, expected in zip(sharded, whole, strict=True):
        assert got["losses"] == pytest.approx(expected["losses"], rel=1e-6)
        assert got["grad_norms"] == pytest.approx(expected["grad_norms"], rel=1e-6)
    parameters = assemble(whole, lambda result: result["parameters"])
    for key, parameter in assemble(sharded, lambda result: result["parameters"]).items():
        close(f"parameter {key}", parameter, parameters[key], rtol=1e-5)


def test_each_rank_holds_its_share_of_the_state(workers: WorkerPool, base_dir: Path, task_files: list[Path]) -> None:
    """DP=4 with EP=2: replicated parameters are shared out to four ranks, an expert's to the two that hold it."""
    world_size, parallel = LAYOUTS["DP=4, EP=2"]
    settings = overrides(base_dir, task_files, *parallel)
    whole = workers.run("jobs_distributed_optimizer:state_sizes", world_size, overrides=settings)
    sharded = workers.run("jobs_distributed_optimizer:state_sizes", world_size, overrides=[*settings, SHARDED])
    for dense, expert, parameters in whole:
        assert dense + expert == parameters
    dense, expert, _ = whole[0]
    assert sum(size for size, _, _ in sharded) == dense
    assert sum(size for _, size, _ in sharded) == 2 * expert  # two groups of experts
    assert max(size for size, _, _ in sharded) < 0.3 * dense
    assert max(size for _, size, _ in sharded) < 0.6 * expert


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([SHARDED, "DP=2"], [SHARDED, "DP=2"]),
        ([SHARDED, "DP=4, EP=2"], [SHARDED, "TP=2"]),
        ([SHARDED, "EP=2"], ["one process"]),
        (["TP=2"], [SHARDED, "EP=2"]),
    ],
)
def test_resume(
    first: list[str], second: list[str], workers: WorkerPool, base_dir: Path, task_files: list[Path], tmp_path: Path
) -> None:
    """As it was bit by bit, on another layout or with the other optimizer within rounding."""
    settings = overrides(base_dir, task_files, "train_iters=4", "eval_iters=0")

    def run(how: list[str], *more: str) -> list[tuple[int, float]]:
        world_size, parallel = (LAYOUTS | {"one process": (1, [])})[how[-1]]
        return workers.run("train_with_cli", world_size, overrides=[*settings, *parallel, *how[:-1], *more])[0]

    save = f"save={tmp_path / 'save'}"
    whole = run(first)
    resumed = run(first, save, "exit_interval=2") + run(second, save, f"load={tmp_path / 'save'}")
    if first == second:
        assert resumed == whole
    assert [iteration for iteration, _ in resumed] == [1, 2, 3, 4]
    assert [loss for _, loss in resumed] == pytest.approx([loss for _, loss in whole], rel=1e-5)
