"""When a run is disturbed: at any time, or as soon as something is seen of it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable

from tools.torture.runs import EVAL_INTERVAL, ITERATIONS, Run

#: Waits for the moment; a number from 0 to 1 says where in it.
Moment = Callable[[Run, float], None]


def _starting(run: Run, part: float) -> None:
    """Imports, the ranks' meeting, loading."""
    run.rest(part * run.site.start_seconds)


def _born(run: Run, part: float) -> None:
    """A rank's first moments."""
    before = {rank.pid for rank in run.ranks()}
    run.wait_until(lambda: bool({rank.pid for rank in run.ranks()} - before), run.site.start_seconds)
    run.rest(0.5 * part)


def _loading(run: Run, part: float) -> None:
    """The last part of a start."""
    run.rest((0.6 + 0.4 * part) * run.site.start_seconds)


def _step(run: Run, part: float) -> None:
    before = run.steps()
    run.wait_for(lambda: run.steps() > before)
    run.rest(0.3 * part)


def _evaluation(run: Run, part: float) -> None:
    """It follows the log line of its step."""

    def count() -> int:
        steps = re.findall(r"^iteration +(\d+)/", run.text, re.MULTILINE)
        return sum(int(step) % EVAL_INTERVAL == 0 for step in steps)

    before = count()
    run.wait_for(lambda: count() > before)
    run.rest(0.05 * part)


def _saving(run: Run, part: float) -> None:
    before = _places(run, ".iter_*.partial")
    run.wait_for(lambda: bool(_places(run, ".iter_*.partial") - before))
    run.rest(0.03 * part)


def _publishing(run: Run, part: float) -> None:
    """Between the renames and removals that end a save."""
    before = _places(run, "iter_*")
    run.wait_for(lambda: bool(_places(run, "iter_*") - before))
    run.rest(0.005 * part)


def _places(run: Run, pattern: str) -> set[tuple[str, int]]:
    """Entries of `save`; one that was made again is another."""
    found = set()
    for entry in run.save.glob(pattern):
        with contextlib.suppress(FileNotFoundError):
            found.add((entry.name, entry.stat().st_ino))
    return found


def _ending(run: Run, part: float) -> None:
    """The last save, and the end of the processes."""
    run.wait_for(lambda: f"\niteration {ITERATIONS}/" in run.text)
    run.rest(part)


MOMENTS: dict[str, Moment] = {
    "start": _starting,
    "birth": _born,
    "load": _loading,
    "step": _step,
    "eval": _evaluation,
    "save": _saving,
    "publish": _publishing,
    "end": _ending,
}
