"""What has been done, and what was found."""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path

#: Counted, in the order of the last line.
DONE = ("kills", "torn", "fuzzed", "hangs", "full_disk", "signals")
#: A run that does not come to its end, or goes back; a wrong result, damage or an exit code that is not noticed;
#: processes that outlive their run.
FAULTS = ("lost", "wrong", "orphans")


class Findings:
    """Counts, and tells on stderr what is being done.

    Attributes:
        job: how to repeat what is under way; set by the caller.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.job = ""
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        """Progress."""
        seconds = int(time.monotonic() - self._began)
        print(f"[{seconds // 60:3d}:{seconds % 60:02d}] {text}", file=sys.stderr, flush=True)

    def fault(self, kind: str, text: str, kept: Path | None = None) -> None:
        """One of :data:`FAULTS`, in one line, with what is needed to repeat it."""
        self.counts[kind] += 1
        where = f"; kept: {kept}" if kept else ""
        self.say(f"{kind.upper()}: {' '.join(text.split())}; repeat: {self.job}{where}")

    @property
    def has_faults(self) -> bool:
        """Whether anything was found."""
        return any(self.counts[kind] for kind in FAULTS)

    @property
    def line(self) -> str:
        """``kills=12 torn=345 ... lost=0 wrong=0 orphans=0``."""
        return " ".join(f"{name}={self.counts[name]}" for name in (*DONE, *FAULTS))
