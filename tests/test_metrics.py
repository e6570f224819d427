"""What a run reports: TensorBoard tags, routing counts that add up, the banner, a bf16 run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.test_parity import overrides
from tests.workers import WorkerPool

SITES = [
    f"layers.{i}.{p}" for i in range(2)
    for p in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
]  # fmt: skip


def read_events(directory: Path) -> EventAccumulator:
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    return events


@pytest.mark.parametrize("layout", ["EP=2", "TP=2", "PP=2"])
def test_tensorboard(layout: str, workers: WorkerPool, base_dir: Path, task_files: list[Path], tmp_path: Path) -> None:
    parallel = {
        "EP=2": ["expert_model_parallel_size=2"],
        "TP=2": ["tensor_model_parallel_size=2", "sequence_parallel=true"],
        "PP=2": ["pipeline_model_parallel_size=2"],
    }[layout]
    settings = overrides(base_dir, task_files, *parallel, "train_iters=2", "log_interval=1", "eval_iters=2")
    workers.run("train_with_cli", 2, overrides=[*settings, f"save={tmp_path}"])
    events = read_events(tmp_path / "tensorboard")
    scalars = set(events.Tags()["scalars"])
    assert {"lm loss", "lm loss validation", "learning-rate", "grad-norm", "throughput", "iteration-time"} <= scalars
    assert {"lm loss validation/reverse", "lm loss validation/add", "lm loss/add"} <= scalars
    assert {"malora/aux loss", "malora/balance", "malora/worst balance", "malora/router entropy"} <= scalars
    for site in SITES:
        assert 1.0 <= events.Scalars(f"malora/balance/{site}")[0].value <= 4.0
        assert 0.0 < events.Scalars(f"malora/router entropy/{site}")[0].value <= math.log(4) + 1e-6
    check_counts(events, settings)


def check_counts(events: EventAccumulator, settings: list[str]) -> None:
    """Every token takes topk=2 slots in every projection, and the tasks' counts add up to the projection's."""
    totals = set()
    for site in SITES:
        for step, whole in enumerate(events.Histograms(f"malora/tokens per expert/{site}")):
            by_task = [
                events.Histograms(f"malora/tokens per task and expert/{site}/{task}")[step].histogram_value
                for task in ("reverse", "add")
            ]
            summed = [sum(counts) for counts in zip(*(h.bucket for h in by_task), strict=True)]
            assert summed == whole.histogram_value.bucket
            totals.add((step, sum(whole.histogram_value.bucket)))
    assert len(totals) == 2, "all projections see the same tokens"
    assert all(total % 2 == 0 and total > 0 for _, total in totals)


def test_routing_counts_do_not_depend_on_the_layout(
    workers: WorkerPool, base_dir: Path, task_files: list[Path], tmp_path: Path
) -> None:
    seen = {}
    for name, parallel in (("one", []), ("TP", ["tensor_model_parallel_size=2", "sequence_parallel=true"])):
        settings = overrides(base_dir, task_files, *parallel, "train_iters=1", "log_interval=1", "eval_iters=0")
        save = tmp_path / name
        workers.run("train_with_cli", 1 + bool(parallel), overrides=[*settings, f"tensorboard_dir={save}"])
        events = read_events(save)
        counts = {site: events.Histograms(f"malora/tokens per expert/{site}")[0].histogram_value for site in SITES}
        seen[name] = {site: list(h.bucket) for site, h in counts.items()}
        seen[name]["aux"] = [round(events.Scalars("malora/aux loss")[0].value, 5)]
    assert seen["one"] == seen["TP"]


@pytest.mark.parametrize("parallel", [[], ["expert_model_parallel_size=2"]], ids=["one process", "EP=2"])
def test_bf16_base_trains_close_to_float32(
    parallel: list[str], workers: WorkerPool, base_dir: Path, task_files: list[Path]
) -> None:
    """The base and the computation in bfloat16, adapters and optimizer in float32; bf16 has 8 bits: within 3%."""
    settings = overrides(base_dir, task_files, *parallel, "train_iters=8", "eval_iters=0")
    world_size = 1 + bool(parallel)
    full = workers.run("train_with_cli", world_size, overrides=settings)[0]
    half = workers.run("train_with_cli", world_size, overrides=[*settings, "bf16=true"])[0]
    assert half != full
    for (_, a), (_, b) in zip(full, half, strict=True):
        assert b == pytest.approx(a, rel=0.03)
    assert half[-1][1] < half[0][1]
