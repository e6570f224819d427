"""What takes a step's time: spans on the device, and where this rank waits for others."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.distributed import Work


class Spans:
    """Seconds that named spans take: of this process, on CUDA of its current stream.

    A span inside another one does not count for the outer. On CUDA a span is two events, so that nothing waits for the
    device until :meth:`seconds` is asked for.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._open: list[str] = []
        self._ended: list[tuple[str, str | None, Any, Any]] = []  # name, the span around it, beginning, end

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """What runs inside counts for a name."""
        outer = self._open[-1] if self._open else None
        self._open.append(name)
        began = self._now()
        try:
            yield
        finally:
            self._ended.append((name, outer, began, self._now()))
            self._open.pop()

    def seconds(self) -> dict[str, float]:
        """Of each name; waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        total: Counter[str] = Counter()
        for name, outer, began, ended in self._ended:
            took = began.elapsed_time(ended) / 1e3 if self._device.type == "cuda" else ended - began
            total[name] += took
            if outer is not None:
                total[outer] -= took
        return dict(total)

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@contextlib.contextmanager
def around_waits(around: Callable[[Work], AbstractContextManager[object]]) -> Iterator[None]:
    """Inside, every wait of this process for a collective runs in ``around(work)``, also in backward."""
    wait = vars(Work)["wait"]

    def observed(work: Work, *args: Any, **kwargs: Any) -> Any:
        with around(work):
            return wait(work, *args, **kwargs)

    with replaced(Work, "wait", observed):
        yield


@contextlib.contextmanager
def replaced(cls: type, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """For a while, another method. The former one comes from the class's dict: as an attribute it would not bind."""
    before = vars(cls)[name]
    setattr(cls, name, function)
    try:
        yield
    finally:
        setattr(cls, name, before)
