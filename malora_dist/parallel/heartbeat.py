"""When a step does not end: which ranks are silent, and where the others stand.

A thread of every rank writes into the shared store where its main thread is. It stops with its process, so a rank whose
entry no longer changes is stopped or gone, and the entry says where it was.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Self

import torch.distributed as dist

from malora_dist.parallel.topology import Topology

#: Part of the timeout after which a step counts as stuck, so that the report comes before the timeout.
_STUCK = 0.7
#: Part of the timeout between two beats, at most.
_BEAT = 0.04
_LONGEST_BEAT_SECONDS = 5.0
#: A rank is silent if its entry has not changed in so many beats.
_BEATS_OF_SILENCE = 4
_MOST_LISTED = 8


class Heartbeat:
    """Beats while it is entered.

    Args:
        timeout: seconds that a collective may wait, as the process groups have it.
    """

    def __init__(self, topology: Topology, timeout: float) -> None:
        self._rank, self._world_size = topology.rank, topology.world_size
        self._store = topology.store.clone()  # type: ignore[attr-defined]  # a connection of the thread's own
        self._beat_seconds, self._stuck_seconds = min(_LONGEST_BEAT_SECONDS, _BEAT * timeout), _STUCK * timeout
        self._main = threading.get_ident()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._beats = self._iteration = 0
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        if self._world_size > 1:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._world_size > 1:
            self._thread.join(2 * self._beat_seconds)  # a store that does not answer must not keep the process

    def begin(self, iteration: int) -> None:
        """Note that this iteration begins; it ends with the next one's beginning."""
        self._iteration, self._began = iteration, time.monotonic()

    def _run(self) -> None:
        with contextlib.suppress(dist.DistError):  # the store has gone with its process: the main thread meets it too
            self._watch()

    def _watch(self) -> None:
        reported = 0
        while not self._ended.wait(self._beat_seconds):
            self._beat()
            if self._iteration != reported and time.monotonic() - self._began > self._stuck_seconds:
                reported = self._iteration
                self._report()

    def _beat(self) -> None:
        self._beats += 1
        frame = sys._current_frames()[self._main]
        self._store.set(self._key(self._rank), f"{self._beats} iteration {self._iteration} at {where(frame)}")

    def _report(self) -> None:
        seconds = time.monotonic() - self._began
        stack = "".join(traceback.format_stack(sys._current_frames()[self._main]))
        _say(
            f"[rank {self._rank}] iteration {self._iteration} has not ended after {seconds:.0f} s; this rank is at\n"
            f"{stack}"
        )
        before = self._entries()
        for _ in range(_BEATS_OF_SILENCE):
            self._ended.wait(self._beat_seconds)
            self._beat()
        after = self._entries()
        alive = [rank for rank in range(self._world_size) if after[rank] != before[rank]]
        if not self._ended.is_set() and self._rank == alive[0]:
            _say(_summary(after, alive))

    def _entries(self) -> list[str]:
        keys = [self._key(rank) for rank in range(self._world_size)]
        return [self._store.get(key).decode() if self._store.check([key]) else "" for key in keys]

    @staticmethod
    def _key(rank: int) -> str:
        return f"heartbeat/{rank}"


def _summary(entries: list[str], alive: list[int]) -> str:
    """One line on the ranks that are silent, else on where all of them stand."""
    stands = [entry.partition(" ")[2] or "an unknown place, before its first step" for entry in entries]
    silent = [rank for rank in range(len(entries)) if rank not in alive]
    if silent:
        text = "; ".join(f"rank {rank}, last seen in {stands[rank]}" for rank in silent[:_MOST_LISTED])
        return f"no sign of life from {len(silent)} of {len(entries)} ranks, stopped or gone: {text}"
    places: dict[str, list[str]] = {}
    for rank in alive:
        places.setdefault(stands[rank], []).append(str(rank))
    text = "; ".join(f"rank {','.join(ranks[:_MOST_LISTED])} in {place}" for place, ranks in places.items())
    return f"all ranks are alive but one waits for another, or a step takes long: {text}"


def where(frame: FrameType | None) -> str:
    """The innermost line of this project that leads to a frame, and the frame's own."""
    inner = outer = ""
    while frame is not None and not outer:
        line = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"
        inner = inner or line
        if str(frame.f_globals.get("__name__")).startswith("malora_dist."):
            outer = line
        frame = frame.f_back
    return outer if outer in ("", inner) else f"{outer}, in {inner}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
