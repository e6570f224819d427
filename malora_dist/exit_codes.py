"""How a run that a signal ends says so to what started it."""

from __future__ import annotations

import signal

#: They end a run after the step under way, which is saved first.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
#: Does so too, but the run shall start again: the number of machines changes.
RESTART_SIGNAL = signal.SIGUSR2


def stopped_exit_code(number: int) -> int:
    """That of a run which a signal has ended, as shells have it: SIGTERM 143, SIGINT 130, SIGUSR1 138 (on Linux)."""
    return 128 + number
