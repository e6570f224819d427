"""Goes round through everything until the time is over."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from transformers.utils import logging

from tests.fuzzing import PROPERTIES
from tools.torture.damage import Files, fuzz
from tools.torture.disturbances import full_disk_run, hang_run, kill_run, signal_run
from tools.torture.findings import Findings
from tools.torture.runs import Site

#: One round. Runs take the most time by far.
_ROUND = "kills torn kills signals kills fuzzed kills hangs kills torn kills full_disk".split()  # noqa: SIM905
#: Damaged files or inputs in a row.
_SLICE_SECONDS = 60.0


def torture(folder: Path, findings: Findings, seed: int, minutes: float, jobs: Sequence[str]) -> None:
    """Do these jobs in turn, the first with this seed, the next with the next number, and so on."""
    end = time.monotonic() + 60 * minutes
    logging.disable_progress_bar()
    site = Site(folder)
    files = Files(folder, findings, seed) if "torn" in jobs else None
    names = itertools.cycle(PROPERTIES)

    def in_a_row(act: Callable[[random.Random], None], seed: int) -> None:
        rng, slice_end = random.Random(seed), min(end, time.monotonic() + _SLICE_SECONDS)
        while time.monotonic() < slice_end:
            act(rng)

    def tear(seed: int) -> None:
        assert files is not None
        in_a_row(lambda _: files.damage_one(), seed)
        findings.say(f"torn: {files.flipped} of {files.total} bytes were flipped so far")

    def fuzz_inputs(seed: int) -> None:
        in_a_row(lambda rng: fuzz(findings, next(names), rng.randrange(2**32)), seed)
        findings.say(f"fuzzed: {findings.counts['fuzzed']} inputs so far")

    run: dict[str, Callable[[int], None]] = {
        "kills": lambda seed: kill_run(site, findings, seed),
        "torn": tear,
        "fuzzed": fuzz_inputs,
        "hangs": lambda seed: hang_run(site, findings, seed),
        "full_disk": lambda seed: full_disk_run(site, findings, seed),
        "signals": lambda seed: signal_run(site, findings, seed),
    }
    seeds = itertools.count(seed)
    for job in itertools.cycle([job for job in _ROUND if job in jobs]):
        if time.monotonic() >= end:
            return
        number = next(seeds)
        findings.job = f"python tools/torture.py --jobs {job} --seed {number}"
        run[job](number)
