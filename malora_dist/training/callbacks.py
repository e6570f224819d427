"""What happens between the steps of a run: figures, evaluations, checkpoints.

The trainer calls every callback on every rank and in the same order, so a callback may use collectives.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from malora_dist.config import Config
from malora_dist.errors import TrainingError, stopped_exit_code
from malora_dist.metrics.loggers.base import Logger, Metrics
from malora_dist.training.evaluation import TaskLosses


class Step(NamedTuple):
    """One optimizer step, over all ranks.

    Attributes:
        iteration: its number, from 1.
        losses: mean answer losses of its global batch.
        grad_norm: before clipping; not finite: the step was skipped.
        learning_rate: that it was made with.
        tokens: in the global batch, padding left out.
        seconds: that it took.
    """

    iteration: int
    losses: TaskLosses
    grad_norm: float
    learning_rate: float
    tokens: int
    seconds: float

    @property
    def is_skipped(self) -> bool:
        """Whether nothing was updated."""
        return not math.isfinite(self.grad_norm)


class Callback:
    """Does nothing; subclasses override what they need."""

    def wants_record(self, iteration: int) -> bool:
        """Whether this coming step shall keep its routing and traffic."""
        return False

    def after_step(self, step: Step) -> None:
        """Called when a step is done."""


class Periodic(Callback):
    """Due at every ``interval``-th step and at the last; at an interval of 0 at the last only."""

    def __init__(self, interval: int, last_iteration: int) -> None:
        self._interval, self._last = interval, last_iteration

    def is_due(self, iteration: int) -> bool:
        """Whether something is to be done after this step."""
        return iteration == self._last or (self._interval > 0 and iteration % self._interval == 0)


class StopIfNotFinite(Callback):
    """Ends a run whose gradients are not finite ``max_skipped_steps`` times in a row, before anything is saved.

    Args:
        sources: where the samples of the last step's global batch stand.
    """

    def __init__(self, config: Config, logger: Logger, sources: Callable[[], list[str]]) -> None:
        self._config, self._logger, self._sources = config, logger, sources
        self._in_a_row = 0

    def after_step(self, step: Step) -> None:
        if not step.is_skipped:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        samples = _listed(self._sources())
        what = f"loss {step.losses.overall:g}, gradient norm {step.grad_norm:g}"
        self._logger.message(f"iteration {step.iteration} is skipped: {what}; its samples: {samples}")
        limit = self._config.max_skipped_steps
        if self._in_a_row >= limit > 0:
            first = step.iteration - limit + 1
            raise TrainingError(
                f"iterations {first} to {step.iteration} had no finite gradient ({what}), as many in a row as "
                f"max_skipped_steps={limit} allows; nothing of them is saved: go on from the last checkpoint with a "
                f"lower lr={self._config.lr:g}, or mend the last samples: {samples}"
            )


def _listed(names: Sequence[str], most: int = 8) -> str:
    """The first few, in one line."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


class Log(Periodic):
    """Reports a step's figures every ``log_interval`` steps; its times are means since the last report.

    Args:
        recorded: the figures of a recorded step's routing and traffic; a collective.
    """

    def __init__(self, config: Config, logger: Logger, recorded: Callable[[], Metrics]) -> None:
        super().__init__(config.log_interval, config.last_iteration)
        self._logger, self._recorded = logger, recorded
        self._steps: list[Step] = []

    def wants_record(self, iteration: int) -> bool:
        return self.is_due(iteration)

    def after_step(self, step: Step) -> None:
        self._steps.append(step)
        if not self.is_due(step.iteration):
            return
        seconds = sum(s.seconds for s in self._steps)
        metrics = self._recorded()
        metrics.scalars |= {
            "lm loss": step.losses.overall,
            "learning-rate": step.learning_rate,
            "grad-norm": step.grad_norm,
            "throughput": sum(s.tokens for s in self._steps) / seconds,
            "iteration-time": seconds / len(self._steps),
            "skipped-iterations": float(sum(s.is_skipped for s in self._steps)),
        }
        metrics.scalars |= {f"lm loss/{task}": loss for task, loss in step.losses.by_task.items()}
        self._logger.log(metrics, step.iteration)
        self._steps.clear()


class Evaluate(Periodic):
    """Reports the validation splits' losses every ``eval_interval`` steps.

    Args:
        evaluate: computes them; a collective.
    """

    def __init__(self, config: Config, logger: Logger, evaluate: Callable[[], TaskLosses]) -> None:
        super().__init__(config.eval_interval, config.last_iteration)
        self._logger, self._evaluate = logger, evaluate

    def after_step(self, step: Step) -> None:
        if not self.is_due(step.iteration):
            return
        losses = self._evaluate()
        if losses.by_task:  # empty where no task has a validation split
            by_task = {f"lm loss validation/{task}": loss for task, loss in losses.by_task.items()}
            self._logger.log(Metrics({"lm loss validation": losses.overall, **by_task}), step.iteration)


class Save(Periodic):
    """Writes a checkpoint every ``save_interval`` steps.

    Args:
        save: writes it and returns its directory; a collective.
    """

    def __init__(self, config: Config, logger: Logger, save: Callable[[], Path]) -> None:
        super().__init__(config.save_interval, config.last_iteration)
        self._logger, self._save = logger, save

    def after_step(self, step: Step) -> None:
        if self.is_due(step.iteration):
            self._logger.message(f"saved {self._save()}")


class StopOnSignal(Callback):
    """Ends a run that has received a signal, as SystemExit with the signal's exit code; comes last.

    Args:
        agreed: the number of the signal that a rank has received, or 0; a collective.
        save: writes a checkpoint and returns its directory; a collective. None: the run saves nothing.
        is_saved: whether this step is saved already.
    """

    def __init__(
        self,
        logger: Logger,
        agreed: Callable[[], int],
        save: Callable[[], Path] | None,
        is_saved: Callable[[int], bool],
    ) -> None:
        self._logger, self._agreed, self._save, self._is_saved = logger, agreed, save, is_saved

    def after_step(self, step: Step) -> None:
        number = self._agreed()
        if not number:
            return
        if self._save is None:
            done = "nothing is saved, for want of save=DIR"
        elif self._is_saved(step.iteration):
            done = "which is saved"
        else:
            done = f"saved {self._save()}"
        self._logger.message(f"{signal.Signals(number).name}: stops after iteration {step.iteration}, {done}")
        raise SystemExit(stopped_exit_code(number))
