"""Runs that are killed, stopped, signalled, or have no room left to write; each must come to the undisturbed end."""

from __future__ import annotations

import contextlib
import random
import re
import shutil
import signal
import time

import psutil
import torch

from malora_dist.checkpoint.convert import read_adapter_weights
from malora_dist.checkpoint.inspection import inspect
from malora_dist.errors import MaloraError
from malora_dist.exit_codes import stopped_exit_code
from tools.torture.findings import Findings
from tools.torture.moments import MOMENTS
from tools.torture.runs import LAYOUTS, HangsError, Layout, Run, Site

#: Restarts beyond those that the disturbances need.
_SPARE_RESTARTS = 3
_TIMEOUT_SECONDS = 12.0


def drawn_keys(rng: random.Random) -> list[str]:
    """How a run saves."""
    return [
        f"async_save={rng.random() < 0.5}",
        f"save_interval={rng.choice((1, 2))}",
        f"keep_last={rng.choice((0, 2))}",
        f"keep_best={rng.random() < 0.3}",
    ]


class Disturbed:
    """One run under torture: does to it what the caller draws, and judges what comes of it.

    Args:
        name: of the job.
        keys: config keys beside those of the layout.
    """

    def __init__(
        self, site: Site, findings: Findings, name: str, layout: Layout, keys: list[str], restarts: int
    ) -> None:
        self.findings, self.expected = findings, site.expected(layout)
        self.run = Run(site, layout, keys, f"{name}-{time.time_ns()}", restarts + _SPARE_RESTARTS)
        self._events = [f"{name}: {layout.name} {' '.join(keys)}:"]
        self._is_sound, self._began = True, time.monotonic()

    def __enter__(self) -> Run:
        return self.run.__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        """End the run, tell about it and remove its folder, unless something was found."""
        if is_hanging := isinstance(error, HangsError):
            self.fault("lost", str(error))
        self.run.__exit__(kind, error, trace)
        self.findings.say(f"{' '.join(self._events)} {'as undisturbed' if self._is_sound else 'NOT as it should be'}")
        if self._is_sound and error is None:
            shutil.rmtree(self.run.folder)
        return is_hanging

    def note(self, event: str) -> None:
        """Add to what is told of this run."""
        seconds = time.monotonic() - self._began
        self._events.append(f"{event} ({seconds:.0f} s, iteration {self.run.published()})")

    def fault(self, kind: str, text: str) -> None:
        """Tell a fault and keep the run's folder."""
        self._is_sound = False
        self.findings.fault(kind, f"{text} - {' '.join(self._events)}", self.run.folder)

    def check_gone(self) -> None:
        """The launch has ended: nothing of it may be left, and every checkpoint that has its name is sound."""
        self.run.agent.wait()
        for process in self.run.orphans():
            self.fault("orphans", f"process {process.pid} is left: {' '.join(process.cmdline())[-200:]}")
            process.kill()
        for name, fault in self._damaged():
            self.fault("lost", f"{name} was published and is not sound: {fault}")

    def _damaged(self) -> list[tuple[str, str]]:
        if not any(self.run.save.glob("iter_*")):
            return []
        return [(f.directory.name, f.fault) for f in inspect(self.run.save) if f.fault and f.directory != self.run.save]

    def finish(self) -> None:
        """Let it come to its end, and compare."""
        code = self.run.end()
        self.check_gone()
        if code != 0:
            self.fault("lost", f"it ends with exit code {code}: {self.run.text[-300:]}")
        else:
            self.compare()

    def compare(self) -> None:
        """Against the undisturbed run."""
        if back := self.run.went_back():
            self.fault("lost", back)
        if left := [entry.name for entry in self.run.save.glob(".*")]:
            self.fault("wrong", f"left behind in save: {left}")
        try:
            tensors = read_adapter_weights(self.run.save).tensors
        except MaloraError as error:
            self.fault("lost", str(error))
            return
        if tensors.keys() != self.expected.keys():
            self.fault("wrong", "other tensors than an undisturbed run")
        elif differing := [key for key, value in tensors.items() if not torch.equal(value, self.expected[key])]:
            self.fault("wrong", f"{len(differing)} of {len(tensors)} tensors differ, the first {differing[0]}")


def kill_run(
    site: Site,
    findings: Findings,
    seed: int,
    layout: Layout | None = None,
    plan: list[tuple[str, str]] | None = None,
) -> None:
    """kill -9 at several moments of a run.

    Args:
        layout: default: drawn.
        plan: (rank, agent or all; one of `MOMENTS`) in turn; default: drawn.
    """
    rng = random.Random(seed)
    layout = layout or rng.choice(LAYOUTS)
    keys = drawn_keys(rng)
    drawn = [
        (rng.choice(("rank", "rank", "agent", "all")), rng.choice(list(MOMENTS))) for _ in range(rng.randint(3, 7))
    ]
    plan = plan or drawn
    disturbed = Disturbed(site, findings, "kills", layout, keys, restarts=len(plan))
    with disturbed as run:
        for target, moment in plan:
            MOMENTS[moment](run, rng.random())
            if not run.is_running:
                break
            run.disturb()
            victims = drawn_victims(run, target, rng)
            kill(victims)
            findings.counts["kills"] += 1
            disturbed.note(f"{target} at {moment}")
            if run.agent in victims:
                disturbed.check_gone()
                run.start()
        disturbed.finish()


def drawn_victims(run: Run, target: str, rng: random.Random) -> list[psutil.Process]:
    """A rank (the agent, while there is none), the agent, or everything in any order."""
    ranks = run.ranks()
    if target == "all":
        return rng.sample([run.agent, *ranks], len(ranks) + 1)
    return [rng.choice(ranks)] if target == "rank" and ranks else [run.agent]


def kill(processes: list[psutil.Process]) -> None:
    """kill -9, one after the other."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def hang_run(site: Site, findings: Findings, seed: int, layout: Layout | None = None) -> None:
    """SIGSTOP of a rank that trains: the run goes on by itself within the timeout and the time of a start."""
    rng = random.Random(seed)
    layout = layout or rng.choice(LAYOUTS)
    keys = [*drawn_keys(rng), f"distributed_timeout_minutes={_TIMEOUT_SECONDS / 60}"]
    moment = rng.choice(("step", "eval", "save", "publish"))
    disturbed = Disturbed(site, findings, "hangs", layout, keys, restarts=3)
    with disturbed as run:
        run.wait_for(lambda: run.steps() > 0)
        MOMENTS[moment](run, rng.random())
        run.disturb()
        number, ranks, starts = rng.randrange(layout.ranks), run.ranks(), run.text.count("going on at")
        if len(ranks) == layout.ranks:
            ranks[number].suspend()
            began = time.monotonic()
            disturbed.note(f"rank {number} stopped at {moment}")
            limit = _TIMEOUT_SECONDS + 30 + 6 * site.start_seconds
            goes_on = run.wait_until(lambda: run.text.count("going on at") > starts, limit)
            if run.is_running and not goes_on:
                raise HangsError(f"still hangs after {limit:.0f} s")
            findings.counts["hangs"] += 1
            disturbed.note(f"goes on after {time.monotonic() - began:.0f} s")
        disturbed.finish()


def signal_run(site: Site, findings: Findings, seed: int, layout: Layout | None = None) -> None:
    """A signal to the launch, to all its processes or to a rank, at any moment; then the same command again."""
    rng = random.Random(seed)
    layout = layout or rng.choice(LAYOUTS)
    number = rng.choice((signal.SIGTERM, signal.SIGUSR1, signal.SIGINT))
    target = rng.choice(("launch", "launch", "all", "rank"))
    moment = rng.choice(list(MOMENTS))
    disturbed = Disturbed(site, findings, "signals", layout, drawn_keys(rng), restarts=1)
    with disturbed as run:
        MOMENTS[moment](run, rng.random())
        run.disturb()
        has_begun = run.steps() > 0
        ranks = run.ranks()
        receivers = {"launch": [run.agent], "all": [run.agent, *ranks], "rank": ranks[:1]}[target]
        for receiver in receivers:
            with contextlib.suppress(psutil.NoSuchProcess):
                receiver.send_signal(number)
        disturbed.note(f"{number.name} to {target} at {moment}")
        findings.counts["signals"] += 1
        code = run.end()
        allowed = {0, stopped_exit_code(number)} | (set() if has_begun else {-number})
        if code not in allowed:
            disturbed.fault("wrong", f"exit code {code}, not {stopped_exit_code(number)}: {run.text[-300:]}")
        if stopped := re.search(r"^ends after iteration (\d+): SIG", run.text, re.MULTILINE):
            disturbed.note(f"exit code {code} after iteration {stopped[1]}")
            if run.published() != int(stopped[1]):
                disturbed.fault("lost", f"iteration {stopped[1]} was not saved")
        disturbed.check_gone()
        run.disturb()
        run.start()
        disturbed.finish()


def full_disk_run(site: Site, findings: Findings, seed: int, layout: Layout | None = None) -> None:
    """From the second checkpoint on, the files of one or all ranks cannot grow beyond a size; later there is room."""
    rng = random.Random(seed)
    layout = layout or rng.choice(LAYOUTS)
    policy = rng.choice(("stop", "continue"))
    disturbed = Disturbed(
        site, findings, "full_disk", layout, [*drawn_keys(rng), f"on_save_error={policy}"], restarts=1
    )
    with disturbed as run:
        run.wait_for(lambda: "\nsaved " in run.text)
        run.disturb()
        limit = rng.choice((0, rng.randrange(1, 4096), rng.randrange(4096, 60_000)))
        ranks = run.ranks()
        full = rng.sample(ranks, rng.choice((1, len(ranks)))) if ranks else []
        limit_files(full, limit)
        disturbed.note(f"files of {len(full)} ranks at most {limit} bytes")
        if policy == "continue":
            run.wait_for(lambda: "no checkpoint: " in run.text)
            limit_files(full, psutil.RLIM_INFINITY)
        code = run.end()
        findings.counts["full_disk"] += 1
        text = run.text
        if code not in (0, 2) or (code == 2 and "cannot be written" not in text) or "Traceback" in text:
            disturbed.fault("wrong", f"exit code {code}: {text[-500:]}")
        disturbed.check_gone()
        if code != 0:
            run.disturb()
            run.start()
        disturbed.finish()


def limit_files(processes: list[psutil.Process], size: int) -> None:
    """No file of theirs can grow beyond so many bytes (RLIMIT_FSIZE)."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            _, hard = process.rlimit(psutil.RLIMIT_FSIZE)
            process.rlimit(psutil.RLIMIT_FSIZE, (size, hard))
