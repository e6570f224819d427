"""TensorBoard event files: scalars, and counts as histograms with one bar per entry.

Written by the step that logs, not by the thread of torch's SummaryWriter: a killed run keeps all its figures, and a
full disk costs only figures.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from pathlib import Path
from typing import Self

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

from malora_dist.config import Config
from malora_dist.errors import ConfigError
from malora_dist.metrics.loggers.base import LOGGERS, Logger, Metrics


@LOGGERS.register("tensorboard")
class TensorBoardLogger(Logger):
    """Writes an event file to a directory; messages are not for it. If it cannot write any more it says so and stops.

    Raises:
        ConfigError: it cannot even begin.
    """

    def __init__(self, directory: Path) -> None:
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._file = (directory / name).open("wb")
            self._writer = RecordWriter(self._file)
            self._writer.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
            self._file.flush()
        except OSError as error:
            raise ConfigError(
                "tensorboard_dir", str(directory), f"cannot be written ({error.strerror})", "name another directory"
            ) from error

    @classmethod
    def create(cls, config: Config) -> Self | None:
        """In ``tensorboard_dir``, else beside the checkpoints; a run that names neither has none."""
        if config.tensorboard_dir:
            return cls(Path(config.tensorboard_dir))
        return cls(Path(config.save) / "tensorboard") if config.save else None

    def log(self, metrics: Metrics, step: int) -> None:
        if self._file.closed:
            return
        try:
            for tag, value in metrics.scalars.items():
                self._write(summary.scalar(tag, value), step)
            for tag, counts in metrics.counts.items():
                self._write(_histogram(tag, counts), step)
            self._file.flush()
        except OSError as error:
            self.close()
            text = f"tensorboard: {self._file.name}: cannot be written ({error.strerror}); it ends before step {step}"
            print(text, file=sys.stderr, flush=True)

    def _write(self, content: Summary, step: int) -> None:
        self._writer.write(Event(wall_time=time.time(), step=step, summary=content).SerializeToString())

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what could not be written is told already
            self._file.close()


def _histogram(tag: str, counts: list[float]) -> Summary:
    return summary.histogram_raw(
        tag,
        min=0,
        max=len(counts) - 1,
        num=sum(counts),
        sum=sum(i * count for i, count in enumerate(counts)),
        sum_squares=sum(i * i * count for i, count in enumerate(counts)),
        bucket_limits=[i + 0.5 for i in range(len(counts))],
        bucket_counts=counts,
    )
