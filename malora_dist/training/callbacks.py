"""What happens between the steps of a run: figures, evaluations, checkpoints.

The trainer calls every callback on every rank and in the same order, so a callback may use collectives.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple

from malora_dist.checkpoint.adapter import Trained
from malora_dist.checkpoint.saving import CheckpointWriter
from malora_dist.config import Config
from malora_dist.errors import CheckpointError, TrainingError, first_few
from malora_dist.exit_codes import stopped_exit_code
from malora_dist.metrics.loggers.base import Logger, Metrics
from malora_dist.metrics.routing import RoutingReport
from malora_dist.metrics.speed import Speed
from malora_dist.metrics.watch import Watch
from malora_dist.progress import Progress
from malora_dist.training.best import Best
from malora_dist.training.evaluation import TaskMeans, Validation

#: So many samples of a step that is skipped are named.
_SHOWN_SAMPLES = 8


class Step(NamedTuple):
    """One optimizer step, over all ranks.

    Attributes:
        iteration: its number, from 1.
        losses: mean answer losses of its global batch.
        grad_norm: before clipping; not finite: the step was skipped.
        learning_rate: that it was made with.
        tokens: in the global batch, padding left out.
        flops: of the model, see :mod:`malora_dist.planning.flops`.
        seconds: that it took.
    """

    iteration: int
    losses: TaskMeans
    grad_norm: float
    learning_rate: float
    tokens: int
    flops: float
    seconds: float

    @property
    def is_skipped(self) -> bool:
        """Whether nothing was updated."""
        return not math.isfinite(self.grad_norm)


class Record(NamedTuple):
    """What a recorded step has kept, over all ranks.

    Attributes:
        routing: of all sites.
        traffic: {group: bytes that this rank's collectives moved}.
        times: where the time went since the report before, and memory.
    """

    routing: RoutingReport
    traffic: Mapping[str, int]
    times: Metrics


class Callback:
    """Does nothing; subclasses override what they need.

    Attributes:
        region: what the time of :meth:`after_step` counts for, see :class:`malora_dist.training.step_clock.StepClock`.
    """

    region: ClassVar[str] = "rest"

    def wants_record(self, iteration: int) -> bool:
        """Whether this coming step shall keep its routing and traffic."""
        return False

    def before_first_step(self, iteration: int) -> None:
        """Called when training begins or goes on after this iteration."""

    def before_step(self, iteration: int) -> None:
        """Called when a step of this number is about to begin."""

    def after_step(self, step: Step) -> None:
        """Called when a step is done."""

    def after_last_step(self, iteration: int) -> None:
        """Called when a run ends after this iteration, not where an error ends it."""

    def on_error(self) -> None:
        """Called when an error that all ranks have met ends the run."""


class Ending:
    """When a run ends: after the config's last iteration, or sooner, which a callback may decide.

    Attributes:
        last_iteration: the step after which it ends.
        reason: why it ends sooner; empty where it does not.
        exit_code: of the process.
    """

    def __init__(self, last_iteration: int) -> None:
        self.last_iteration, self.reason, self.exit_code = last_iteration, "", 0

    def end_after(self, iteration: int, reason: str, exit_code: int = 0) -> None:
        """This step is the last; callbacks that follow do what is due at the last step."""
        if iteration < self.last_iteration:
            self.last_iteration, self.reason, self.exit_code = iteration, reason, exit_code


class Periodic(Callback):
    """Due at every ``interval``-th step and at the last; at an interval of 0 at the last only."""

    def __init__(self, interval: int, ending: Ending) -> None:
        self._interval, self._ending = interval, ending

    def is_due(self, iteration: int) -> bool:
        """Whether something is to be done after this step."""
        return iteration == self._ending.last_iteration or (self._interval > 0 and iteration % self._interval == 0)


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
        samples = first_few(self._sources(), _SHOWN_SAMPLES)
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


class Log(Periodic):
    """Reports a step's figures every ``log_interval`` steps; its times are means since the last report.

    Pictures, every ``picture_interval`` steps, come with the next report.

    Args:
        recorded: what the record of the last step says; a collective.
        speed: makes the figures of how fast it is.
        watch: warns of what looks wrong.
    """

    def __init__(
        self, config: Config, logger: Logger, recorded: Callable[[], Record], speed: Speed, watch: Watch, ending: Ending
    ) -> None:
        super().__init__(config.log_interval, ending)
        self._config, self._logger, self._recorded, self._watch = config, logger, recorded, watch
        self._speed = speed
        self._pictures = Periodic(config.picture_interval, ending)
        self._are_pictures_due = False
        self._steps: list[Step] = []

    def wants_record(self, iteration: int) -> bool:
        return self.is_due(iteration)

    def after_step(self, step: Step) -> None:
        self._steps.append(step)
        self._are_pictures_due |= self._pictures.is_due(step.iteration)
        if not self.is_due(step.iteration):
            return
        seconds = sum(s.seconds for s in self._steps)
        record = self._recorded()
        metrics = record.routing.metrics(of_sites=self._config.log_sites, tables=self._are_pictures_due)
        self._are_pictures_due = False
        metrics.scalars |= {f"malora/bytes/{group}": float(number) for group, number in record.traffic.items()}
        metrics.scalars |= record.times.scalars
        metrics.counts |= record.times.counts
        tokens, flops = sum(s.tokens for s in self._steps), sum(s.flops for s in self._steps)
        metrics.scalars |= self._speed.scalars(tokens, flops, seconds)
        metrics.scalars |= {
            "lm loss": step.losses.overall,
            "learning-rate": step.learning_rate,
            "grad-norm": step.grad_norm,
            "iteration-time": seconds / len(self._steps),
            "skipped-iterations": float(sum(s.is_skipped for s in self._steps)),
        }
        metrics.scalars |= {f"lm loss/{task}": loss for task, loss in step.losses.by_task.items()}
        self._logger.log(metrics, step.iteration)
        for text in self._watch.report(record.routing, metrics):
            self._logger.warn(text, step.iteration)
        self._steps.clear()


class Evaluate(Periodic):
    """Reports losses and accuracies of the validation splits every ``eval_interval`` steps, and follows the best.

    Ends a run after ``early_stopping_patience`` evaluations in a row without a better ``early_stopping_metric``.
    Comes before Save, which may ask whether what it saves is the best.

    Args:
        evaluate: computes them; a collective, with the same result on all ranks.
        watch: warns of what looks wrong.
        best: of the metric; what it holds of a resumed run counts.
    """

    region = "evaluation"

    def __init__(
        self,
        config: Config,
        logger: Logger,
        evaluate: Callable[[], Validation],
        watch: Watch,
        best: Best,
        ending: Ending,
    ) -> None:
        super().__init__(config.eval_interval, ending)
        self._config, self._logger, self._evaluate, self._watch, self._best = config, logger, evaluate, watch, best

    def before_first_step(self, iteration: int) -> None:
        self._end_if_stale(iteration)

    def after_step(self, step: Step) -> None:
        if not self.is_due(step.iteration):
            return
        scalars = self._evaluate().scalars
        if not scalars:  # no task has a validation split
            return
        self._logger.log(Metrics(scalars), step.iteration)
        for text in self._watch.evaluation(scalars, step.iteration):
            self._logger.warn(text, step.iteration)
        self._best.update(scalars[self._best.metric], step.iteration, self._config.early_stopping_threshold)
        self._end_if_stale(step.iteration)

    def _end_if_stale(self, iteration: int) -> None:
        best, patience = self._best, self._config.early_stopping_patience
        if best.without_improvement >= patience > 0:
            since = f"{best.without_improvement} evaluations in a row have not improved {best.metric}"
            self._ending.end_after(iteration, f"{since} (early_stopping_patience={patience})")


class Save(Periodic):
    """Writes a checkpoint every ``save_interval`` steps and, with ``keep_best``, after every best evaluation.

    Args:
        writer: writes them.
        check: refuses to save what must not be; called with the iteration, on all ranks.
        progress: shows that it saves.
    """

    region = "saving"

    def __init__(
        self,
        config: Config,
        logger: Logger,
        writer: CheckpointWriter,
        trained: Trained,
        best: Best,
        ending: Ending,
        check: Callable[[int], None],
        progress: Progress,
    ) -> None:
        super().__init__(config.save_interval, ending)
        self._config, self._logger, self._writer, self._trained = config, logger, writer, trained
        self._best, self._check, self._progress = best, check, progress

    def is_due(self, iteration: int) -> bool:
        return super().is_due(iteration) or (self._config.keep_best and self._best.is_best(iteration))

    def after_step(self, step: Step) -> None:
        is_due, is_last = self.is_due(step.iteration), step.iteration == self._ending.last_iteration
        if self._writer.is_pending and (is_due or self._writer.is_written()):
            self._try(self._finish, is_last=False)  # if this is the last step, its own checkpoint follows
        if is_due:
            self.save(step.iteration, is_last)

    def save(self, iteration: int, is_last: bool) -> None:
        """Write a checkpoint of this iteration, or begin to, with ``async_save`` and more steps to come."""
        self._check(iteration)
        self._try(lambda: self._writer.begin(self._trained, self._best.state_dict()), is_last)
        if self._writer.is_pending and (is_last or not self._config.async_save):
            self._try(self._finish, is_last)

    def on_error(self) -> None:
        if self._writer.is_pending:  # an earlier step's, which is sound
            self._finish()

    def _finish(self) -> None:
        self._logger.message(f"saved {self._writer.finish()}")

    def _try(self, write: Callable[[], None], is_last: bool) -> None:
        """Write; if that is impossible, go on where the config wants it and a later checkpoint makes up for it."""
        try:
            with self._progress.phase("saving"):
                write()
        except CheckpointError as error:
            if is_last or self._config.on_save_error == "stop":
                raise
            self._logger.message(f"no checkpoint: {error}")


class StopOnSignal(Callback):
    """Lets this step be the last of a run that has received a signal; comes before Save.

    Args:
        agreed: the number of the signal that a rank has received, or 0; a collective.
    """

    def __init__(self, config: Config, ending: Ending, agreed: Callable[[], int]) -> None:
        self._has_save, self._ending, self._agreed = bool(config.save), ending, agreed

    def after_step(self, step: Step) -> None:
        number = self._agreed()
        if number:
            unsaved = "" if self._has_save else ", and nothing is saved, as save is not set"
            self._ending.end_after(step.iteration, f"{signal.Signals(number).name}{unsaved}", stopped_exit_code(number))
