"""TensorBoard event files: scalars, and counts as histograms with one bar per entry."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from malora_dist.config import Config
from malora_dist.metrics.loggers.base import Logger, Metrics


class TensorBoardLogger:
    """Writes event files to a directory; messages are not for it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._writer: SummaryWriter | None = SummaryWriter(str(directory))

    def message(self, text: str) -> None:
        """TensorBoard shows figures only."""

    def log(self, metrics: Metrics, step: int) -> None:
        if self._writer is not None:
            with self._giving_up():
                self._write(self._writer, metrics, step)

    def close(self) -> None:
        if self._writer is not None:
            with self._giving_up():
                self._writer.close()

    @contextlib.contextmanager
    def _giving_up(self) -> Iterator[None]:
        """Pictures are not worth a run: if the disk fails, the run goes on without them and says so once."""
        try:
            yield
        except OSError as error:  # of the writer's thread, raised by its next call
            self._writer = None
            print(f"no more TensorBoard events: {self._directory} cannot be written ({error})", file=sys.stderr)

    @staticmethod
    def _write(writer: SummaryWriter, metrics: Metrics, step: int) -> None:
        for tag, value in metrics.scalars.items():
            writer.add_scalar(tag, value, step)
        for tag, counts in metrics.counts.items():
            writer.add_histogram_raw(
                tag,
                min=0,
                max=len(counts) - 1,
                num=sum(counts),
                sum=sum(i * count for i, count in enumerate(counts)),
                sum_squares=sum(i * i * count for i, count in enumerate(counts)),
                bucket_limits=[i + 0.5 for i in range(len(counts))],
                bucket_counts=counts,
                global_step=step,
            )


def make(config: Config) -> Logger | None:
    """In ``tensorboard_dir``, else beside the checkpoints; a run that names neither has none."""
    if config.tensorboard_dir:
        return TensorBoardLogger(Path(config.tensorboard_dir))
    return TensorBoardLogger(Path(config.save) / "tensorboard") if config.save else None
