"""Where a step's time goes: by hand, and in runs with a rank that is slowed by sleep."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed import ProcessGroup

from malora_dist.metrics.history import HistoryReader
from malora_dist.metrics.traffic import BUFFERS, GROUPS
from malora_dist.metrics.watch import COMPUTE_TAG, STRAGGLER_REPORTS
from malora_dist.parallel.timing import Spans
from malora_dist.training.step_clock import _metrics
from tests.layouts import find
from tests.test_parity import overrides
from tests.workers import WorkerPool


def test_a_span_inside_another_counts_once() -> None:
    """The outer one lasts from 0 to 10 and from 20 to 21, the inner ones from 1 to 3 and from 4 to 8."""
    spans = Spans(torch.device("cpu"))
    with mock.patch("time.perf_counter", side_effect=[0, 1, 3, 4, 8, 10, 20, 21]):
        with spans.span("optimizer"):
            with spans.span("dp"):
                pass
            with spans.span("tp"):
                pass
        with spans.span("optimizer"):
            pass
    assert spans.seconds() == {"optimizer": 5, "dp": 2, "tp": 4}


def test_every_collective_is_watched() -> None:
    """What returns a Work says so in the docstring that pybind makes; a callback is no collective."""
    returning = {name for name in vars(ProcessGroup) if "-> c10d::Work" in (getattr(ProcessGroup, name).__doc__ or "")}
    assert len(returning) > 20
    assert returning - {"_register_on_completion_hook"} <= BUFFERS.keys()


def test_shares() -> None:
    """Two ranks: 100 s each, 80 of them in steps; a recorded step of 8 s, 0.8 of it for data."""
    waits = {"ep": (1.8, 0.0), "dp": (0.9, 0.9)}
    ranks = []
    for rank, memory in enumerate((2.0, 3.0)):
        of_groups = [waits.get(group, (0.0, 0.0))[rank] for group in GROUPS]
        data, evaluation, saving, optimizer = 8.0, 10.0, 4.0, 1.44
        ranks.append([100.0, 80.0, 8.0, 0.8, data, evaluation, saving, optimizer, *of_groups, memory, 64.0 + rank])
    found = _metrics(ranks, ["ep", "dp"])
    assert found.scalars == pytest.approx(
        {
            "time share/data": 0.08, "time share/evaluation": 0.1, "time share/saving": 0.04,
            "time share/optimizer": 0.72 * 0.2, "time share/ep": 0.72 / 8, "time share/dp": 0.72 / 8,
            "time share/compute": 0.72 * 0.55, "time share/rest": 0.06, "memory/peak GiB": 3.0,
        }
    )  # fmt: skip
    assert found.counts[COMPUTE_TAG] == pytest.approx([4.5, 6.3])
    assert found.counts["memory/peak GiB by rank"] == [2.0, 3.0]
    assert found.counts["positions by rank"] == [64.0, 65.0]


@pytest.mark.parametrize(
    ("layout", "method", "slow", "where", "groups"),
    [
        ("EP 2", "malora", 1, "forward", {"ep"}),
        ("EP 2", "malora", 1, "backward", {"ep"}),
        ("TP 2", "malora", 1, "forward", {"tp"}),
        ("DP 2", "lora", 0, "forward", {"dp", "edp"}),
        ("PP 2", "malora", 0, "forward", {"pp"}),
    ],
)
def test_who_waits_for_a_slow_rank(
    layout: str, method: str, slow: int, where: str, groups: set[str], workers: WorkerPool, base_dir: Path,
    task_files: list[Path],
) -> None:  # fmt: skip
    """The other one, in the group's collectives, also in those of backward; nobody computes longer but the slow one."""
    keys = [f"method={method}", "dispatch=all_to_all"][: 1 + (layout == "EP 2")]
    settings = overrides(base_dir, task_files, "global_batch_size=4", *keys, *find(layout).settings)
    found = workers.run("jobs_time:record_slowed_step", 2, overrides=settings, slow=slow, seconds=0.4, where=where)
    waits = [sum(rank["waits"].get(group, 0.0) for group in groups) for rank in found]
    assert waits[1 - slow] > 0.35
    assert waits[1 - slow] - waits[slow] > 0.2
    for rank in found:
        assert rank["pending"] == 0, "every collective was waited for"
        _check_report(rank, groups)
        compute = rank["counts"][COMPUTE_TAG]
        assert compute[slow] > 0.4
        assert compute[slow] - compute[1 - slow] > 0.2


def _check_report(rank: dict[str, Any], groups: set[str]) -> None:
    scalars = rank["scalars"]
    shares = {tag.removeprefix("time share/"): share for tag, share in scalars.items() if tag.startswith("time")}
    assert sum(shares.values()) == pytest.approx(1)
    assert all(share > -1e-3 for share in shares.values())
    assert groups - {"edp"} <= shares.keys()
    assert shares["saving"] == pytest.approx(0.1 / (0.1 + rank["step"]), rel=0.3)
    assert scalars["memory/peak GiB"] == max(rank["counts"]["memory/peak GiB by rank"]) > 0.1


@pytest.mark.parametrize("slow", [[1], [0, 1]])
def test_a_straggler_is_named(
    slow: list[int], workers: WorkerPool, base_dir: Path, task_files: list[Path], tmp_path: Path
) -> None:
    """After STRAGGLER_REPORTS reports; where both are as slow, nobody is. In that run steps 2 and 3 are profiled."""
    more = [*find("EP 2").settings, "dispatch=all_to_all", f"save={tmp_path}", "eval_iters=0", "log_interval=1"]
    more += [
        "global_batch_size=4",
        f"train_iters={STRAGGLER_REPORTS}",
        f"profile_steps={[2, 3] if len(slow) == 2 else []}",
    ]
    settings = overrides(base_dir, task_files, *more)
    workers.run("jobs_time:train_slowed", 2, overrides=settings, slow=slow, seconds=0.5)
    history = HistoryReader(tmp_path).read()
    about_time = [(step, text.split(" computes ")[0]) for step, text in history.warnings if "computes" in text]
    assert about_time == ([(STRAGGLER_REPORTS, "rank 1")] if slow == [1] else [])
    shares = {tag for tag in history.scalars if tag.startswith("time share/")}
    assert shares == {
        f"time share/{part}"
        for part in ("compute", "data", "optimizer", "evaluation", "saving", "rest", "ep", "dp", "edp", "tp", "pp")
        if part not in ("tp", "pp", "edp")
    }
    for tag in ("tokens-per-second-per-device", "throughput"):
        assert all(value > 0 for value in history.scalars[tag].values())
    assert "mfu" not in history.scalars, "of a CPU"
    for rank in range(2 if len(slow) == 2 else 0):
        regions = _regions(tmp_path / "profile" / f"rank{rank}_steps_2_3.pt.trace.json.gz")
        parts = {"data", "forward", "project", "route", "dispatch", "experts", "base", "combine", "optimizer"}
        assert parts <= regions.keys()
        assert regions["optimizer"] == 2, "steps"


def _regions(trace: Path) -> dict[str, int]:
    """{name of a region: how often}."""
    with gzip.open(trace, "rt", encoding="utf-8") as content:
        events = json.load(content)["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    return {name: names.count(name) for name in names}


def test_a_profile_names_the_pipeline(
    workers: WorkerPool, base_dir: Path, task_files: list[Path], tmp_path: Path
) -> None:
    more = [*find("PP 2").settings, "eval_iters=0", f"tensorboard_dir={tmp_path}", "loggers=[]"]
    settings = overrides(base_dir, task_files, *more, "train_iters=1", "profile_steps=[1,9]", "device_peak_tflops=1")
    workers.run("train_with_cli", 2, overrides=settings)
    for rank in range(2):
        regions = _regions(tmp_path / "profile" / f"rank{rank}_steps_1_1.pt.trace.json.gz")
        assert {"pipeline", "forward", "experts"} <= regions.keys()
