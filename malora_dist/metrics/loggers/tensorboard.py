"""TensorBoard: event files in ``tensorboard_dir``, else beside the checkpoints.

What they hold: :mod:`malora_dist.metrics.tensorboard_events`. It takes a second to import, which other runs save.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Self

from malora_dist.config import Config
from malora_dist.errors import ConfigError, first_line
from malora_dist.metrics.loggers.base import LOGGERS, Logger, Metrics, RunDescription, has_failed


@LOGGERS.register("tensorboard")
class TensorBoardLogger(Logger):
    """Writes an event file to a directory; if it cannot write any more it says so and stops.

    Raises:
        ConfigError: it cannot even begin.
    """

    def __init__(self, directory: Path) -> None:
        from malora_dist.metrics import tensorboard_events

        self._events = tensorboard_events
        self._run: RunDescription | None = None
        try:
            self._file = tensorboard_events.EventFile(directory)
        except OSError as error:
            raise ConfigError(
                "tensorboard_dir", str(directory), f"cannot be written ({error.strerror})", "name another directory"
            ) from error

    @classmethod
    def create(cls, config: Config) -> Self | None:
        """A run that names neither ``tensorboard_dir`` nor ``save`` has none."""
        directory = _directory(config)
        return cls(directory) if directory else None

    @classmethod
    def remove(cls, config: Config) -> None:
        directory = _directory(config)
        if directory and config.save and directory.resolve().is_relative_to(Path(config.save).resolve()):
            for file in directory.glob("events.out.tfevents.*"):
                file.unlink()

    def begin(self, run: RunDescription) -> None:
        self._run = run
        self._try(lambda: self._file.start(run.iteration + 1), run.iteration)
        self._try(lambda: self._file.write(self._events.introduction(run), run.iteration), run.iteration)

    def warn(self, text: str, step: int) -> None:
        self._try(lambda: self._file.write([self._events.warning(text)], step), step)

    def log(self, metrics: Metrics, step: int) -> None:
        self._try(lambda: self._file.write(self._events.figures(metrics, step), step), step)

    def close(self) -> None:
        run = self._run
        if run and not has_failed():
            _, _, is_complete = self._events.hyperparameters(run)
            self._try(lambda: self._file.write([is_complete], run.iteration), run.iteration)
        self._file.close()

    def _try(self, action: Callable[[], None], step: int) -> None:
        if not self._file.is_open:
            return
        try:
            action()
        except Exception as error:  # noqa: BLE001  whatever happens to a picture or a disk must not end training
            self._file.close()
            reason = getattr(error, "strerror", None) or first_line(error)
            text = f"tensorboard: {self._file.path}: cannot be written ({reason}); it ends before step {step}"
            print(text, file=sys.stderr, flush=True)


def _directory(config: Config) -> Path | None:
    if config.tensorboard_dir:
        return Path(config.tensorboard_dir)
    return Path(config.save) / "tensorboard" if config.save else None
