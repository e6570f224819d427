"""What takes a step's time: spans on the device, and where this rank waits for others."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.distributed import ProcessGroup, Work


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


#: Called instead of a method of a process group: (group, method, arguments, what does it).
Around = Callable[[ProcessGroup, str, tuple[Any, ...], Callable[[], Any]], Any]


@contextlib.contextmanager
def around_collectives(
    methods: Iterable[str], around: Around, around_wait: Callable[[Work], AbstractContextManager[object]]
) -> Iterator[None]:
    """Inside, what process groups are asked for goes through ``around``, and waits run in ``around_wait(work)``.

    Also in backward, on whatever thread that runs. Methods replaced for a while cost nothing elsewhere; a
    TorchDispatchMode, which sees collectives too, would slow every operation of the step.

    Args:
        methods: of process groups; those that this torch does not have are left out.
    """
    wait = vars(Work)["wait"]

    def observed_wait(work: Work, *args: Any, **kwargs: Any) -> Any:
        with around_wait(work):
            return wait(work, *args, **kwargs)

    def observed(name: str) -> Callable[..., Any]:
        method = vars(ProcessGroup)[name]
        return lambda group, *args, **kwargs: around(group, name, args, lambda: method(group, *args, **kwargs))

    with contextlib.ExitStack() as patches:
        patches.enter_context(replaced(Work, "wait", observed_wait))
        for name in methods:
            if name in vars(ProcessGroup):
                patches.enter_context(replaced(ProcessGroup, name, observed(name)))
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
