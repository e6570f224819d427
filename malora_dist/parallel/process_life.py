"""A rank does not outlive the torchrun agent that started it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

#: In it our launch tells its ranks its process id: one that is killed at once may be gone before they ask.
AGENT_VARIABLE = "MALORA_AGENT_PID"

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_POLL_SECONDS = 1.0


def end_with_agent() -> None:
    """From now on this process ends when its parent does, if that is a torchrun agent.

    Any other parent, a shell for example, may go.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        agent = int(os.environ.get(AGENT_VARIABLE) or os.getppid())
        _end_with_parent(agent, is_linux=sys.platform == "linux")


def _end_with_parent(parent: int, is_linux: bool) -> None:
    if is_linux:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
        if os.getppid() != parent:  # it went before the kernel knew
            os.kill(os.getpid(), signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(parent,), name="parent watch", daemon=True).start()


def _watch(parent: int) -> None:
    """Where the kernel sends no signal: an orphan has another parent."""
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)
