"""Signals that end a run in good order: the step is finished, a checkpoint saved, and then it stops."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Self

import torch
import torch.distributed as dist

from malora_dist.exit_codes import RESTART_SIGNAL, STOP_SIGNALS

#: Of a signal that comes twice, from a scheduler to all processes and from torchrun to its ranks, one counts.
_TWICE_WITHIN_SECONDS = 5.0


class StopSignals:
    """While it is entered, the first of `STOP_SIGNALS` and `RESTART_SIGNAL` is noted; a second one ends the process.

    Attributes:
        received: the signal's number, 0: none so far.
    """

    def __init__(self) -> None:
        self.received = 0
        self._received_at = 0.0

    def __enter__(self) -> Self:
        self._former = {number: signal.signal(number, self._note) for number in (*STOP_SIGNALS, RESTART_SIGNAL)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._received_at = number, now
        elif now - self._received_at > _TWICE_WITHIN_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def agreed(self, device: torch.device) -> int:
        """The signal that any rank has received, 0: none; called by all ranks, which get the same answer."""
        number = torch.tensor([self.received], dtype=torch.int32, device=device)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return int(number)
