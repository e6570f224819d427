"""Where a run is, from its reports: how far, how fast, and whether it goes on."""

from __future__ import annotations

import datetime
import itertools
import statistics
from dataclasses import dataclass

from malora_dist.metrics.history import History

#: A run is silent when its last line is so many times longer ago than reports usually are apart,
SILENT = 5
#: so many times the longest time between two, which an evaluation may have taken,
SILENT_LONGEST = 2
#: and at least so many seconds.
SILENT_SECONDS = 30.0
#: or, before its first report, so many seconds.
SILENT_FIRST = 1800.0
#: Reports that speed is taken from.
RECENT = 50


@dataclass(frozen=True)
class RunState:
    """A run at a moment.

    Attributes:
        name: that it is shown under.
        now: seconds since 1970.
    """

    name: str
    history: History
    now: float

    @property
    def iteration(self) -> int:
        """The last that was reported, else the one that the run goes on from."""
        return max(self.history.times, default=int(self.history.run.get("iteration", 0)))

    @property
    def last_iteration(self) -> int:
        """After which the config ends the run; 0: not known yet."""
        config = self.history.run.get("config", {})
        iterations = int(config.get("train_iters", 0))
        return min(iterations, config.get("exit_interval") or iterations)

    @property
    def share(self) -> float:
        """Of the run that is done."""
        return self.iteration / self.last_iteration if self.last_iteration else 0.0

    @property
    def idle_seconds(self) -> float:
        """Since the run has written its last line."""
        return max(self.now - self.history.last_time, 0.0)

    @property
    def is_complete(self) -> bool:
        return self.history.has_ended and not self.history.has_failed and 0 < self.last_iteration <= self.iteration

    @property
    def usual_seconds(self) -> float | None:
        """Between two reports; None before there is one."""
        gaps = self._gaps()
        return statistics.median(gaps) if gaps else None

    @property
    def is_silent(self) -> bool:
        """Whether it has not ended, but reports no more."""
        if self.history.has_ended or not self.history.run:
            return False
        gaps = self._gaps()
        if not gaps:
            return self.idle_seconds > SILENT_FIRST
        longest = max(SILENT * statistics.median(gaps), SILENT_LONGEST * max(gaps), SILENT_SECONDS)
        return self.idle_seconds > longest

    @property
    def seconds_left(self) -> float | None:
        """Until it is complete, at the speed of its last reports, evaluations and saving included.

        None where that says nothing: not yet, or no more.
        """
        recent = self._of_this_start()[-RECENT:]
        if self.history.has_ended or self.is_silent or len(recent) < 2 or not self.last_iteration:
            return None
        (first, began), (last, reported) = recent[0], recent[-1]
        left = (self.last_iteration - last) * (reported - began) / (last - first) - (self.now - reported)
        return max(left, 0.0)

    def describe(self) -> tuple[str, str]:
        """(whether it goes on, a style to say it in)."""
        if self.history.has_failed:
            return f"failed, {duration(self.idle_seconds)} ago", "bold red"
        if self.is_complete:
            return f"done, {duration(self.idle_seconds)} ago", "green"
        if self.history.has_ended:
            return f"ended before its last iteration, {duration(self.idle_seconds)} ago", "yellow"
        if not self.history.run:
            return "has not begun", "yellow"
        usual = self.usual_seconds
        if self.is_silent:
            expected = "no report yet" if usual is None else f"usual {duration(usual)}"
            return f"silent for {duration(self.idle_seconds)} ({expected})", "bold red"
        if usual is None:
            return f"begun, last line {duration(self.idle_seconds)} ago", "green"
        return f"going on, last report {duration(self.idle_seconds)} ago", "green"

    def _of_this_start(self) -> list[tuple[int, float]]:
        """(step, time) of the reports since the run has begun or gone on."""
        start = self.history.run.get("iteration", 0)
        return [(step, time) for step, time in self.history.times.items() if step > start]

    def _gaps(self) -> list[float]:
        """Of the last reports; of the first since the run has begun."""
        reports = [time for _, time in self._of_this_start()]
        times = [self.history.run.get("time", 0.0), *reports][-RECENT - 1 :]
        return [later - earlier for earlier, later in itertools.pairwise(times)]


def duration(seconds: float) -> str:
    """``3 s``, ``4 min``, ``2 h 5 min``, ``3 days``."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 1 or seconds == 0 else f"{seconds:.1f} s"
    minutes = int(seconds // 60)
    if minutes < 60:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} days"


def clock(seconds: float) -> str:
    """``1:02:03``, as the console has it."""
    return str(datetime.timedelta(seconds=round(seconds)))
