"""What is done between the steps of a run, and when; the trainer itself is in tests/test_resume.py and others."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from malora_dist.config import Config
from malora_dist.errors import TrainingError
from malora_dist.metrics.loggers.base import Metrics
from malora_dist.training.best import Best
from malora_dist.training.callbacks import Ending, Evaluate, Log, Periodic, Save, Step, StopIfNotFinite
from malora_dist.training.evaluation import TaskMeans, Validation


class Noting:
    """A logger that keeps what it is told."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.logged: list[tuple[int, Metrics]] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def log(self, metrics: Metrics, step: int) -> None:
        self.logged.append((step, metrics))

    def close(self) -> None: ...


def step(iteration: int, tokens: int = 100, seconds: float = 0.5) -> Step:
    losses = TaskMeans({"add": float(iteration)}, float(iteration))
    return Step(iteration, losses, grad_norm=2.0, learning_rate=1e-3, tokens=tokens, seconds=seconds)


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
    log = Log(
        Config(log_interval=2, train_iters=3), logger, lambda: Metrics({"malora/balance": 1.0}, {"c": [1.0]}), Ending(3)
    )
    for i, (tokens, seconds) in enumerate([(100, 0.5), (300, 1.5), (80, 0.1)], start=1):
        assert log.wants_record(i) == (i > 1)
        log.after_step(step(i, tokens, seconds))
    (first, metrics), (second, rest) = logger.logged
    assert (first, second) == (2, 3)
    assert metrics == Metrics(
        {
            "malora/balance": 1.0, "lm loss": 2.0, "lm loss/add": 2.0, "learning-rate": 1e-3, "grad-norm": 2.0,
            "throughput": 200.0, "iteration-time": 1.0, "skipped-iterations": 0.0,
        },
        {"c": [1.0]},
    )  # fmt: skip
    assert (rest.scalars["throughput"], rest.scalars["iteration-time"]) == (pytest.approx(800), pytest.approx(0.1))
    assert logger.messages == []


def test_evaluate() -> None:
    logger, config = Noting(), Config(eval_interval=2, train_iters=3)
    found = Validation(TaskMeans({"add": 1.0, "sub": 3.0}, 2.5), TaskMeans({"add": 0.5, "sub": 0.1}, 0.2))
    best, ending = Best("accuracy validation/add"), Ending(3)
    evaluate = Evaluate(config, logger, lambda: found, best, ending)
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
    assert (best.value, best.iteration, best.last_iteration, ending.reason) == (0.5, 2, 3, "")
    nothing = TaskMeans({}, float("nan"))
    Evaluate(config, logger, lambda: Validation(nothing, nothing), best, ending).after_step(step(2))
    assert len(logger.logged) == 2, "nothing to report without a validation split"
    assert best.last_iteration == 3


def test_save() -> None:
    logger, saved = Noting(), []

    def save() -> Path:
        saved.append(len(saved))
        return Path(f"run/{len(saved)}")

    callback = Save(Config(save_interval=2, train_iters=3), logger, save, Ending(3))
    for i in (1, 2, 3):
        callback.after_step(step(i))
    assert logger.messages == ["saved run/1", "saved run/2"]


def evaluations(losses: list[float], patience: int, threshold: float = 0.0, best: Best | None = None) -> list[str]:
    """What a run says that evaluates and saves: one evaluation a step, with these losses."""
    config = Config(
        train_iters=9, eval_interval=1, early_stopping_patience=patience, early_stopping_threshold=threshold,
    )  # fmt: skip
    logger, ending, coming = Noting(), Ending(config.last_iteration), iter(losses)

    def evaluate() -> Validation:
        return Validation(TaskMeans({"add": 0.0}, next(coming)), TaskMeans({"add": 0.0}, 0.0))

    callbacks = [
        Evaluate(config, logger, evaluate, best or Best("lm loss validation"), ending),
        Save(config, logger, lambda: Path("run"), ending),
    ]
    for callback in callbacks:
        callback.before_first_step(0)
    iteration = 0
    while iteration < min(ending.last_iteration, len(losses)):
        iteration += 1
        for callback in callbacks:
            callback.after_step(step(iteration))
    return [*logger.messages, f"{iteration}: {ending.reason}"]


def test_early_stopping() -> None:
    """The run ends after so many evaluations in a row without an improvement, and saves what it has."""
    why = "2 evaluations in a row have not improved lm loss validation (early_stopping_patience=2)"
    assert evaluations([3.0, 2.0, 2.5, 2.0, 1.0], patience=2) == ["saved run", f"4: {why}"]
    assert evaluations([3.0, 2.0, 2.5, 1.9, 2.5, 1.8], patience=2) == ["6: "], "one better in between counts anew"
    assert evaluations([3.0, 2.0, 2.5, 2.0, 3.0], patience=0) == ["5: "]
    assert evaluations([3.0, 2.8, 2.6, 1.0], patience=2, threshold=0.3)[-1] == f"3: {why}", "too little counts as none"
    assert evaluations([3.0, math.nan, math.nan, 1.0], patience=2)[-1] == f"3: {why}"
    assert evaluations([math.nan, 3.0, 2.0], patience=2) == ["3: "]


def test_patience_survives_a_resume() -> None:
    best = Best("lm loss validation")
    evaluations([3.0, 2.0, 2.5], patience=2, best=best)
    resumed = Best("lm loss validation")
    resumed.load_state_dict(json.loads(json.dumps(best.state_dict())))
    assert resumed == best
    assert evaluations([2.2, 1.0], patience=2, best=resumed)[0] == "saved run"
    assert (resumed.value, resumed.iteration, resumed.without_improvement) == (2.0, 2, 2)
    assert evaluations([1.0], patience=2, best=resumed)[0].startswith("0: 2 evaluations"), "a run that ended stays so"
    other = Best("accuracy validation")
    other.load_state_dict(best.state_dict())
    assert other == Best("accuracy validation"), "losses say nothing about accuracies"


def test_best() -> None:
    best = Best("accuracy validation/add")
    assert [best.update(value, i) for i, value in enumerate([0.1, 0.3, 0.3, math.nan, 0.2, 0.4])] == [
        True, True, False, False, False, True,
    ]  # fmt: skip
    assert (best.value, best.iteration, best.last_value, best.last_iteration) == (0.4, 5, 0.4, 5)
    assert best.is_best(5)
    assert not best.is_best(6), "no evaluation since"
    assert best.describe() == "best accuracy validation/add: 0.4 at iteration 5"
    best.update(0.41, 7, threshold=0.1)
    assert (best.value, best.without_improvement) == (0.41, 1), "the best, and no improvement"
