"""TensorBoard event files: scalars and a page of charts of them, pictures, texts, hyperparameters, and counts as
histograms with one bar per entry.

Written by the step that logs, not by the thread of torch's SummaryWriter: a killed run keeps all its figures, and a
full disk costs only figures.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

from malora_dist.config import Config
from malora_dist.errors import ConfigError
from malora_dist.metrics.loggers.base import LOGGERS, Logger, Metrics, RunDescription, config_as_yaml, has_failed
from malora_dist.metrics.tensorboard_layout import COMPARED_FIGURES, FIRST_KEYS, compared, layout


@LOGGERS.register("tensorboard")
class TensorBoardLogger(Logger):
    """Writes an event file to a directory; if it cannot write any more it says so and stops.

    Raises:
        ConfigError: it cannot even begin.
    """

    def __init__(self, directory: Path) -> None:
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        self._run: RunDescription | None = None
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

    def begin(self, run: RunDescription) -> None:
        self._run = run
        self._write(_introduction(run), run.iteration)

    def warn(self, text: str, step: int) -> None:
        self._write([summary.text("warnings", text)], step)

    def log(self, metrics: Metrics, step: int) -> None:
        self._write(_figures(metrics, step), step)

    def close(self) -> None:
        if self._run and not has_failed():
            _, _, is_complete = _hyperparameters(self._run)
            self._write([is_complete], self._run.iteration)
        self._close()

    def _write(self, contents: Iterable[Summary], step: int) -> None:
        if self._file.closed:
            return
        try:
            for content in contents:
                event = Event(wall_time=time.time(), step=step, summary=content)
                self._writer.write(event.SerializeToString())
            self._file.flush()
        except OSError as error:
            self._close()
            text = f"tensorboard: {self._file.name}: cannot be written ({error.strerror}); it ends before step {step}"
            print(text, file=sys.stderr, flush=True)

    def _close(self) -> None:
        with contextlib.suppress(OSError):  # what could not be written is told already
            self._file.close()


def _introduction(run: RunDescription) -> Iterator[Summary]:
    yield summary.custom_scalars(layout(run))
    yield summary.text("start", f"```\n{run.banner}\n```")
    yield summary.text("config", f"```\n{config_as_yaml(run.config)}```")
    *begun, _ = _hyperparameters(run)
    yield from begun


def _figures(metrics: Metrics, step: int) -> Iterator[Summary]:
    for tag, value in metrics.scalars.items():
        yield summary.scalar(tag, value)
    for tag, counts in metrics.counts.items():
        yield _histogram(tag, counts)
    if metrics.tables:
        from malora_dist.metrics.pictures import draw  # imports matplotlib

        for tag, png in draw(metrics.tables, f"iteration {step}").items():
            yield _image(tag, png)


def _hyperparameters(run: RunDescription) -> tuple[Summary, Summary, Summary]:
    """What the columns are, the same in every run's file; this run's settings; that the run has ended well."""
    columns, _, _ = summary.hparams(compared(run, with_unused=True), dict.fromkeys(COMPARED_FIGURES))
    plugin = columns.value[0].metadata.plugin_data
    described = HParamsPluginData.FromString(plugin.content)
    for info in described.experiment.hparam_infos:
        info.differs = info.name in FIRST_KEYS  # these are shown first, of the others only some
    plugin.content = described.SerializeToString()
    _, settings, is_complete = summary.hparams(compared(run), {})
    return columns, settings, is_complete


def _image(tag: str, png: bytes) -> Summary:
    """Width and height stand at a fixed place in a PNG."""
    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
    image = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=png)
    return Summary(value=[Summary.Value(tag=tag, image=image)])


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
