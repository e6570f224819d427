"""Step time and throughput between two log lines."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Clock:
    """Seconds, steps and tokens since the last lap; pauses (evaluation, saving) left out."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._steps = 0
        self._tokens = 0

    def add(self, tokens: int) -> None:
        """Count one step of ``tokens`` tokens (global batch, padding left out)."""
        self._steps += 1
        self._tokens += tokens

    def lap(self) -> tuple[float, float]:
        """(seconds per step, tokens per second) since the last lap; starts a new one."""
        now = time.perf_counter()
        elapsed = now - self._started
        figures = elapsed / max(self._steps, 1), self._tokens / elapsed
        self._started, self._steps, self._tokens = now, 0, 0
        return figures

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What runs inside is not counted."""
        began = time.perf_counter()
        yield
        self._started += time.perf_counter() - began
