"""Where the time of a run goes, from one report to the next."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch.profiler import record_function

from malora_dist.metrics.loggers.base import Metrics
from malora_dist.metrics.traffic import GROUPS
from malora_dist.metrics.watch import COMPUTE_TAG, POSITIONS_TAG, SHARE_TAG
from malora_dist.parallel.device import peak_memory
from malora_dist.parallel.timing import Spans
from malora_dist.parallel.topology import Topology

#: Regions whose share is of all the time since the report before, by the clock of the process.
_ALWAYS = ("data", "evaluation", "saving")
#: Those that are noted in recorded steps, on the device.
_RECORDED = ("optimizer", *GROUPS)
_GIB = 2**30


class StepClock:
    """Adds up what regions of a run take on this rank.

    Attributes:
        spans: of the last recorded step: the optimizer, and the waits for each process group.
        positions: of this rank's microbatches of the last step, padding included: its work.
    """

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self.spans = Spans(topology.device)
        self.positions = 0
        self._is_recording = False
        self._seconds: defaultdict[str, float] = defaultdict(float)  # of regions and of steps, since the last report
        self._recorded_step = self._recorded_data = 0.0
        self._recorded_positions = 0
        self._step_began = self._data_before = 0.0
        self.restart()

    def restart(self) -> None:
        """What was before does not count."""
        self._began = time.perf_counter()
        self._seconds.clear()

    @contextlib.contextmanager
    def region(self, name: str) -> Iterator[None]:
        """What runs inside counts for a name, by the clock of the process; a region of a profile, too."""
        began = time.perf_counter()
        try:
            with record_function(name):
                yield
        finally:
            self._seconds[name] += time.perf_counter() - began

    def on_device(self, name: str) -> AbstractContextManager[object]:
        """What runs inside counts for a name if the step is recorded, by the time of the device; a region, too."""
        return self._span(name) if self._is_recording else record_function(name)

    @contextlib.contextmanager
    def _span(self, name: str) -> Iterator[None]:
        with record_function(name), self.spans.span(name):
            yield

    def begin_step(self, record: bool) -> None:
        """A step begins."""
        self._is_recording = record
        if record:
            self.spans = Spans(self._topology.device)
        self._step_began, self._data_before = time.perf_counter(), self._seconds["data"]

    def end_step(self) -> float:
        """It has ended; the seconds that it took."""
        seconds = time.perf_counter() - self._step_began
        self._seconds["step"] += seconds
        if self._is_recording:
            self._recorded_step, self._recorded_data = seconds, self._seconds["data"] - self._data_before
            self._recorded_positions = self.positions
        self._is_recording = False
        return seconds

    def report(self) -> Metrics:
        """Shares of the time since the last report, compute and memory by rank; called by all ranks, restarts.

        One collective, and the only one.
        """
        spans, seconds = self.spans.seconds(), self._seconds
        device = self._topology.device
        mine = [time.perf_counter() - self._began, seconds["step"], self._recorded_step, self._recorded_data]
        mine += [seconds[name] for name in _ALWAYS] + [spans.get(name, 0.0) for name in _RECORDED]
        mine += [peak_memory(device) / _GIB, float(self._recorded_positions)]
        self.restart()
        vector = torch.tensor(mine, dtype=torch.float64, device=device)
        ranks = torch.empty(self._topology.world_size, len(mine), dtype=torch.float64, device=device)
        dist.all_gather(list(ranks), vector)
        return _metrics(ranks.tolist(), [group for group in GROUPS if self._is_reported(group, spans)])

    def _is_reported(self, group: str, spans: dict[str, float]) -> bool:
        size: int = (
            spans.get(group, 0) > 0 if group == "other" else getattr(self._topology, f"{group}_group").size() - 1
        )
        return size > 0


def _metrics(ranks: list[list[float]], groups: list[str]) -> Metrics:
    """The figures of what every rank has noted, see :meth:`StepClock.report`."""
    names = ("whole", "step", "recorded step", "recorded data", *_ALWAYS, *_RECORDED, "memory", "positions")
    by_name = dict(zip(names, zip(*ranks, strict=True), strict=True))
    total = {name: sum(values) for name, values in by_name.items()}
    shares = {name: total[name] / total["whole"] for name in _ALWAYS}
    # A recorded step stands for the others: its parts are scaled to the time that all steps took.
    in_steps = total["step"] / total["whole"] - shares["data"]
    without_data = max(total["recorded step"] - total["recorded data"], 1e-9)
    parts = {name: in_steps * total[name] / without_data for name in _RECORDED}
    shares |= {name: parts[name] for name in ("optimizer", *groups)}
    shares["compute"] = in_steps - sum(parts.values())
    shares["rest"] = 1 - in_steps - sum(shares[name] for name in _ALWAYS)
    waits = [sum(waits) for waits in zip(*(by_name[group] for group in GROUPS), strict=True)]
    parts_of_ranks = zip(by_name["recorded step"], by_name["recorded data"], waits, strict=True)
    scalars = {f"{SHARE_TAG}{name}": share for name, share in shares.items()}
    return Metrics(
        scalars | {"memory/peak GiB": max(by_name["memory"])},
        {
            COMPUTE_TAG: [step - data - wait for step, data, wait in parts_of_ranks],
            POSITIONS_TAG: list(by_name["positions"]),
            "memory/peak GiB by rank": list(by_name["memory"]),
        },
    )
