"""TensorBoard's events: scalars and a page of charts of them, pictures, texts, hyperparameters, and counts as
histograms with one bar per entry.

Written by who calls, not by the thread of torch's SummaryWriter: a killed run keeps all its figures, and a full disk
costs only figures.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

from malora_dist.metrics.loggers.base import Metrics, RunDescription, config_as_yaml
from malora_dist.metrics.tensorboard_layout import COMPARED_FIGURES, FIRST_KEYS, compared, layout


class EventFile:
    """A new event file in a directory.

    Raises:
        OSError: it cannot be written; so do its methods.
    """

    def __init__(self, directory: Path) -> None:
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / name
        self._file = self.path.open("wb")
        self._writer = RecordWriter(self._file)
        self._add(Event(file_version="brain.Event:2"))
        self._file.flush()

    @property
    def is_open(self) -> bool:
        return not self._file.closed

    def start(self, step: int) -> None:
        """The run begins or goes on with this step: what the directory's older files have from it on is gone."""
        self._add(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
        self._file.flush()

    def write(self, contents: Iterable[Summary], step: int) -> None:
        """Add what belongs to a step."""
        for content in contents:
            self._add(Event(step=step, summary=content))
        self._file.flush()

    def close(self) -> None:
        """What cannot be flushed has been told."""
        with contextlib.suppress(OSError):
            self._file.close()

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._writer.write(event.SerializeToString())


def introduction(run: RunDescription) -> Iterator[Summary]:
    """What stands before the first step."""
    yield summary.custom_scalars(layout(run))
    yield summary.text("start", f"```\n{run.banner}\n```")
    yield summary.text("config", f"```\n{config_as_yaml(run.config)}```")
    *begun, _ = hyperparameters(run)
    yield from begun


def figures(metrics: Metrics, step: int) -> Iterator[Summary]:
    """Those of a step, its pictures last."""
    for tag, value in metrics.scalars.items():
        yield summary.scalar(tag, value)
    for tag, counts in metrics.counts.items():
        yield _histogram(tag, counts)
    for tag, png in metrics.pictures(f"iteration {step}").items():
        yield _image(tag, png)


def warning(text: str) -> Summary:
    """Text that stands below `warnings`."""
    return summary.text("warnings", text)


def hyperparameters(run: RunDescription) -> tuple[Summary, Summary, Summary]:
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
