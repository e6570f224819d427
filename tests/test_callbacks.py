"""What is done between the steps of a run, and when; the trainer itself is in tests/test_resume.py and others."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch

from malora_dist.checkpoint.adapter import Trained
from malora_dist.checkpoint.saving import CheckpointWriter
from malora_dist.config import Config
from malora_dist.errors import CheckpointError, TrainingError
from malora_dist.layers.routing_context import SiteStatistics
from malora_dist.metrics.loggers.base import Logger, Metrics
from malora_dist.metrics.routing import RoutingReport
from malora_dist.metrics.speed import Speed
from malora_dist.metrics.watch import Watch
from malora_dist.progress import Progress
from malora_dist.training.best import Best
from malora_dist.training.callbacks import Ending, Evaluate, Log, Periodic, Record, Save, Step, StopIfNotFinite
from malora_dist.training.evaluation import TaskMeans, Validation


class Noting(Logger):
    """A logger that keeps what it is told."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.logged: list[tuple[int, Metrics]] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def log(self, metrics: Metrics, step: int) -> None:
        self.logged.append((step, metrics))


def step(iteration: int, tokens: int = 100, seconds: float = 0.5) -> Step:
    losses = TaskMeans({"add": float(iteration)}, float(iteration))
    return Step(iteration, losses, grad_norm=2.0, learning_rate=1e-3, tokens=tokens, flops=4e12, seconds=seconds)


@pytest.mark.parametrize(
    ("interval", "last", "due"), [(2, 5, [2, 4, 5]), (0, 5, [5]), (1, 3, [1, 2, 3]), (9, 4, [4]), (2, 4, [2, 4])]
)
def test_when_something_is_due(interval: int, last: int, due: list[int]) -> None:
    periodic = Periodic(interval, Ending(last))
    assert [i for i in range(1, last + 1) if periodic.is_due(i)] == due


def test_a_run_ends_at_exit_interval() -> None:
    assert Config(train_iters=9).last_iteration == 9
    assert Config(train_iters=9, exit_interval=4).last_iteration == 4
    assert Config(train_iters=9, exit_interval=40).last_iteration == 9


def test_a_run_of_steps_without_finite_gradients_ends_it() -> None:
    """They are told with their samples; one good step in between starts the count anew."""
    logger = Noting()
    guard = StopIfNotFinite(Config(max_skipped_steps=2), logger, lambda: ["a.jsonl:7", "b.jsonl:9"])
    bad = [step(i)._replace(grad_norm=norm) for i, norm in ((1, math.nan), (3, math.inf), (4, -math.inf))]
    guard.after_step(bad[0])
    guard.after_step(step(2))
    guard.after_step(bad[1])
    assert len(logger.messages) == 2
    assert all("a.jsonl:7, b.jsonl:9" in message for message in logger.messages)
    with pytest.raises(TrainingError, match=r"iterations 3 to 4 .*max_skipped_steps=2.*lower lr=.*b\.jsonl:9"):
        guard.after_step(bad[2])
    never = StopIfNotFinite(Config(max_skipped_steps=0), logger, list)
    for _ in range(9):
        never.after_step(bad[0])


def test_log() -> None:
    """Times are means since the last report, losses and norm the step's own; a step to report is recorded."""
    logger = Noting()
    config = Config(log_interval=2, train_iters=3, picture_interval=1, num_lora_experts=2, topk=1)
    zero = torch.zeros(())
    site = SiteStatistics(torch.tensor([[0.0, 0.0], [3.0, 1.0]]), zero, zero, zero)
    record = Record(
        RoutingReport({"layers.0.q_proj": site}, config, ["add"]),
        {"ep": 12},
        Metrics({"time share/data": 0.1}, {"a": [2.0]}),
    )
    log = Log(config, logger, lambda: record, Speed(devices=2, peak_tflops=8.0), Watch(config, [0]), Ending(3))
    for i, (tokens, seconds) in enumerate([(100, 0.5), (300, 1.5), (80, 0.1)], start=1):
        assert log.wants_record(i) == (i > 1)
        log.after_step(step(i, tokens, seconds))
    (first, metrics), (second, rest) = logger.logged
    assert (first, second) == (2, 3)
    expected = {
        "malora/bytes/ep": 12.0, "lm loss": 2.0, "lm loss/add": 2.0, "learning-rate": 1e-3, "grad-norm": 2.0,
        "tokens-per-second": 200.0, "tokens-per-second-per-device": 100.0, "throughput": 2.0, "mfu": 0.25,
        "time share/data": 0.1, "iteration-time": 1.0, "skipped-iterations": 0.0, "malora/balance/max": 1.5,
    }  # fmt: skip
    assert metrics.scalars.items() >= expected.items()
    assert "malora/load/q_proj" in metrics.tables
    assert metrics.counts == {"a": [2.0]}, "sites are not asked for"
    assert (rest.scalars["tokens-per-second"], rest.scalars["iteration-time"]) == (
        pytest.approx(800),
        pytest.approx(0.1),
    )
    assert logger.messages == []


def test_evaluate() -> None:
    logger, config = Noting(), Config(eval_interval=2, train_iters=3)
    found = Validation(TaskMeans({"add": 1.0, "sub": 3.0}, 2.5), TaskMeans({"add": 0.5, "sub": 0.1}, 0.2))
    best, ending = Best("accuracy validation/add"), Ending(3)
    evaluate = Evaluate(config, logger, lambda: found, Watch(config, [0]), best, ending)
    for i in (1, 2, 3):
        assert not evaluate.wants_record(i)
        evaluate.after_step(step(i))
    expected = Metrics(
        {
            "lm loss validation": 2.5, "lm loss validation/add": 1.0, "lm loss validation/sub": 3.0,
            "accuracy validation": 0.2, "accuracy validation/add": 0.5, "accuracy validation/sub": 0.1,
        }
    )  # fmt: skip
    assert logger.logged == [(2, expected), (3, expected)]
    assert (best.value, best.iteration, ending.reason) == (0.5, 2, "")
    nothing = TaskMeans({}, float("nan"))
    Evaluate(config, logger, lambda: Validation(nothing, nothing), Watch(config, [0]), best, ending).after_step(step(2))
    assert len(logger.logged) == 2, "nothing to report without a validation split"


class SlowWriter:
    """Begins checkpoints, which are written two looks later, and may fail to."""

    def __init__(self, failing: tuple[int, ...] = ()) -> None:
        self.failing = failing
        self.begun = 0
        self.is_pending = False
        self.looks = 0

    def begin(self, trained: Any, metrics: object) -> None:
        assert not self.is_pending
        self.is_pending, self.looks = True, 0
        self.begun += 1

    def is_written(self) -> bool:
        self.looks += 1
        return self.looks >= 2

    def finish(self) -> str:
        self.is_pending = False
        if self.begun in self.failing:
            raise CheckpointError(f"number {self.begun}")
        return f"run/{self.begun}"


def saves(writer: SlowWriter, steps: int, losses: dict[int, float] | None = None, **config: Any) -> list[str]:
    """What is told after each step.

    Args:
        losses: of evaluations, by iteration.
    """
    losses = losses or {}
    logger, best, checked = Noting(), Best("lm loss validation"), list[int]()
    callback = Save(
        Config(train_iters=steps, **config), logger, cast("CheckpointWriter", writer), cast("Trained", None), best,
        Ending(steps), checked.append, Progress(is_shown=False),
    )  # fmt: skip
    for i in range(1, steps + 1):
        if i in losses:
            best.update(losses[i], i)
        callback.after_step(step(i))
        logger.messages.append("|")
    return "".join(logger.messages).removesuffix("|").split("|")


def test_save() -> None:
    assert saves(SlowWriter(), 3, save_interval=2) == ["", "saved run/1", "saved run/2"]
    assert saves(SlowWriter(), 2, save_interval=0) == ["", "saved run/1"]


def test_the_best_is_saved() -> None:
    """After an evaluation that is better than all before it, besides the usual ones."""
    losses = {1: 3.0, 2: 2.0, 3: 2.5, 4: 1.0}
    told = saves(SlowWriter(), 5, losses, save_interval=0, keep_best=True)
    assert told == ["saved run/1", "saved run/2", "", "saved run/3", "saved run/4"]
    assert saves(SlowWriter(), 5, losses, save_interval=0) == ["", "", "", "", "saved run/1"]


def test_save_while_training_goes_on() -> None:
    """A checkpoint is published when it is written, or when the next is due; the last one before the run ends."""
    late = saves(SlowWriter(), 6, save_interval=3, async_save=True)
    assert late == ["", "", "", "", "saved run/1", "saved run/2"]
    soon = saves(SlowWriter(), 3, save_interval=1, async_save=True)
    assert soon == ["", "saved run/1", "saved run/2saved run/3"]


def test_a_checkpoint_that_cannot_be_written() -> None:
    """Ends the run, or only where `on_save_error` says so and a later one makes up for it."""
    with pytest.raises(CheckpointError, match="number 1"):
        saves(SlowWriter(failing=(1,)), 3, save_interval=1)
    told = saves(SlowWriter(failing=(1,)), 2, save_interval=1, on_save_error="continue")
    assert told == ["no checkpoint: number 1", "saved run/2"]
    with pytest.raises(CheckpointError, match="number 2"):
        saves(SlowWriter(failing=(2,)), 2, save_interval=1, on_save_error="continue")
