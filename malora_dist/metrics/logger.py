"""Where a run's figures go: the console and TensorBoard on one rank, nowhere on the others."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch.utils.tensorboard import SummaryWriter

from malora_dist.metrics.routing import RoutingReport


class Logger(Protocol):
    """What the trainer reports to."""

    def message(self, text: str) -> None:
        """A line for the console."""
        ...

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Figures by TensorBoard tag."""
        ...

    def routing(self, report: RoutingReport, step: int) -> None:
        """Routing figures."""
        ...

    def close(self) -> None:
        """Flush and close."""
        ...


class NullLogger:
    """Reports nothing: for every rank but the writer."""

    def message(self, text: str) -> None: ...

    def scalars(self, values: Mapping[str, float], step: int) -> None: ...

    def routing(self, report: RoutingReport, step: int) -> None: ...

    def close(self) -> None: ...


class ConsoleLogger:
    """Prints; writes TensorBoard event files when given a directory."""

    def __init__(self, tensorboard_dir: Path | None) -> None:
        self._writer = SummaryWriter(str(tensorboard_dir)) if tensorboard_dir is not None else None

    def message(self, text: str) -> None:
        print(text, flush=True)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        if self._writer is not None:
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, step)

    def routing(self, report: RoutingReport, step: int) -> None:
        """Counts become histograms with one bar per expert."""
        self.scalars(report.scalars, step)
        if self._writer is None:
            return
        for tag, counts in report.expert_counts.items():
            total = sum(counts)
            mean = sum(e * c for e, c in enumerate(counts))
            squares = sum(e * e * c for e, c in enumerate(counts))
            self._writer.add_histogram_raw(
                tag,
                min=0,
                max=len(counts) - 1,
                num=total,
                sum=mean,
                sum_squares=squares,
                bucket_limits=[e + 0.5 for e in range(len(counts))],
                bucket_counts=counts,
                global_step=step,
            )

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def progress_line(iteration: int, train_iters: int, figures: Mapping[str, str], seconds_per_iteration: float) -> str:
    """``iteration 20/400 | lm loss 2.31 | ... | ETA 0:01:20``"""
    eta = datetime.timedelta(seconds=round(seconds_per_iteration * (train_iters - iteration)))
    width = len(str(train_iters))
    middle = " | ".join(f"{name} {value}" for name, value in figures.items())
    return f"iteration {iteration:{width}d}/{train_iters} | {middle} | ETA {eta}"
