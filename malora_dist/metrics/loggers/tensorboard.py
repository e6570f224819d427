"""TensorBoard event files: scalars, and counts as histograms with one bar per entry."""

from __future__ import annotations

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from malora_dist.config import Config
from malora_dist.metrics.loggers.base import Logger, Metrics


class TensorBoardLogger:
    """Writes event files to a directory; messages are not for it."""

    def __init__(self, directory: Path) -> None:
        self._writer = SummaryWriter(str(directory))

    def message(self, text: str) -> None:
        """TensorBoard shows figures only."""

    def log(self, metrics: Metrics, step: int) -> None:
        for tag, value in metrics.scalars.items():
            self._writer.add_scalar(tag, value, step)
        for tag, counts in metrics.counts.items():
            self._writer.add_histogram_raw(
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

    def close(self) -> None:
        self._writer.close()


def make(config: Config) -> Logger | None:
    """In ``tensorboard_dir``, else beside the checkpoints; a run that names neither has none."""
    if config.tensorboard_dir:
        return TensorBoardLogger(Path(config.tensorboard_dir))
    return TensorBoardLogger(Path(config.save) / "tensorboard") if config.save else None
