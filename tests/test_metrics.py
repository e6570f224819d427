"""What a run reports: loggers, TensorBoard tags, routing counts that add up; and a bf16 run."""

from __future__ import annotations

import math
import re
import resource
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from malora_dist.config import Config
from malora_dist.errors import ConfigError
from malora_dist.metrics.loggers.base import LOGGERS, Logger, Loggers, Metrics, make_loggers
from malora_dist.metrics.loggers.tensorboard import TensorBoardLogger
from tests.test_parity import overrides
from tests.workers import WorkerPool

SITES = [
    f"layers.{i}.{p}" for i in range(2)
    for p in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
]  # fmt: skip


def test_console(capsys: pytest.CaptureFixture[str]) -> None:
    """One line for a logged step, one for an evaluation, nothing for what the console does not show."""
    loggers = make_loggers(Config(train_iters=400))
    step = {
        "grad-norm": 0.12345,
        "lm loss": 2.3,
        "learning-rate": 3e-4,
        "tokens-per-second": 1234.5,
        "iteration-time": 0.25,
    }
    loggers.log(Metrics(step | {"lm loss/add": 2.2}, {"malora/tokens per expert/x": [1.0, 2.0]}), 20)
    loggers.log(Metrics(step | {"malora/balance/median": 1.5}), 200)
    loggers.log(Metrics({"lm loss validation": 1.5, "lm loss validation/add": 1.0, "lm loss validation/b c": 2.0}), 20)
    loggers.log(Metrics({"malora/bytes/ep": 1.0}), 20)
    loggers.message("two\nlines")
    loggers.close()
    assert capsys.readouterr().out.splitlines() == [
        "iteration  20/400 | lm loss 2.3000 | lr 3.00e-04 | grad-norm 0.123 | tokens/s 1,234 | "
        "s/it 0.250 | ETA 0:01:35",
        "iteration 200/400 | lm loss 2.3000 | lr 3.00e-04 | grad-norm 0.123 | balance 1.50 | tokens/s 1,234 | "
        "s/it 0.250 | ETA 0:00:50",
        "validation at iteration 20: add 1.0000, b c 2.0000",
        "two",
        "lines",
    ]


def test_where_tensorboard_writes(tmp_path: Path) -> None:
    for config, directory in (
        (Config(save=str(tmp_path / "a")), tmp_path / "a" / "tensorboard"),
        (Config(save=str(tmp_path / "b"), tensorboard_dir=str(tmp_path / "c")), tmp_path / "c"),
    ):
        config.loggers = ["tensorboard"]
        loggers = make_loggers(config)
        loggers.log(Metrics({"lm loss validation": 0.5}, {"counts": [3.0, 0.0, 1.0]}), 7)
        loggers.close()
        events = read_events(directory)
        [scalar], [histogram] = events.Scalars("lm loss validation"), events.Histograms("counts")
        assert (scalar.step, scalar.value) == (7, 0.5)
        assert (histogram.step, list(histogram.histogram_value.bucket)) == (7, [3.0, 0.0, 1.0])
    assert not (tmp_path / "b").exists()


def test_a_new_logger_is_a_registered_class(capsys: pytest.CaptureFixture[str]) -> None:
    """It is used where the config names it and it wants to be."""
    seen: list[int] = []

    class Noting(Logger):
        @classmethod
        def create(cls, config: Config) -> Noting | None:
            return cls() if config.train_iters == 3 else None

        def log(self, metrics: Metrics, step: int) -> None:
            seen.append(step)

    with LOGGERS.registered(noting=Noting):
        make_loggers(Config(train_iters=3, loggers=["noting"])).log(Metrics(), 1)
        make_loggers(Config(train_iters=4, loggers=["noting"])).log(Metrics(), 2)
        make_loggers(Config(train_iters=3, loggers=[])).log(Metrics(), 3)
    assert seen == [1]
    assert capsys.readouterr().out == ""
    with pytest.raises(ConfigError, match=r"^loggers='noting': must be one of console, jsonl, .*tensorboard.*; choose"):
        make_loggers(Config(loggers=["noting"]))


def test_no_loggers_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    loggers = Loggers()
    loggers.message("text")
    loggers.log(Metrics({"lm loss": 1.0}), 1)
    loggers.close()
    assert capsys.readouterr() == ("", "")


def test_tensorboard_on_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run goes on without it, and says so once; at the start it is an error."""
    logger = TensorBoardLogger(tmp_path)
    logger.log(Metrics({"lm loss": 1.0}), 1)
    (file,) = tmp_path.iterdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 10, hard))
    try:
        for step in (2, 3):
            logger.log(Metrics({"lm loss": 1.0}), step)
        logger.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert capsys.readouterr().err == (
        f"tensorboard: {file}: cannot be written (File too large); it ends before step 2\n"
    )
    assert [event.step for event in read_events(tmp_path).Scalars("lm loss")] == [1]
    with pytest.raises(ConfigError, match=r"^tensorboard_dir='.*': cannot be written \(Not a directory\); name"):
        TensorBoardLogger(file / "below")


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
    workers.run("train_with_cli", 2, overrides=[*settings, "log_sites=true", f"save={tmp_path}"])
    events = read_events(tmp_path / "tensorboard")
    scalars = set(events.Tags()["scalars"])
    assert {
        "lm loss",
        "lm loss validation",
        "learning-rate",
        "grad-norm",
        "tokens-per-second",
        "iteration-time",
    } <= scalars
    assert {"lm loss validation/reverse", "lm loss validation/add", "lm loss/add"} <= scalars
    assert {"malora/aux loss", "malora/balance/median", "malora/balance/max", "malora/router entropy"} <= scalars
    for site in SITES:
        assert 1.0 <= events.Scalars(f"malora/balance/{site}")[0].value <= 4.0
        assert 0.0 < events.Scalars(f"malora/router entropy/{site}")[0].value <= math.log(4) + 1e-6
    check_counts(events, settings)
    (page,) = events.Tensors("custom_scalars__config__")
    groups = Layout.FromString(page.tensor_proto.string_val[0]).category
    tags = [tag for group in groups for chart in group.chart for tag in chart.multiline.tag]
    assert len(tags) == 15
    empty = {tag for tag in tags if not any(re.match(tag, name) for name in scalars)}
    assert not empty
    assert events.Tags()["images"] == ["pictures/load", "pictures/load of tasks", "pictures/task information"]


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
        workers.run(
            "train_with_cli", 1 + bool(parallel), overrides=[*settings, "log_sites=true", f"tensorboard_dir={save}"]
        )
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
