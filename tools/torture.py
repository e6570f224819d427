"""Break runs, files and inputs on purpose for some minutes, and count what does not hold.

    python tools/torture.py --minutes 60

On CPU ranks of this machine, root not needed; needs the packages of the tests. Runs of two to four ranks are killed,
stopped, signalled and given no room to write, at moments that are drawn or aimed, and must come to the end of an
undisturbed run bit by bit. Checkpoints and bases are damaged in every byte, and inputs at random, and each has to be
noticed. Progress and findings go to stderr, each with what repeats it. The last line counts what was done, and what was
found: `lost` runs that do not end or go back behind a checkpoint, `wrong` weights, exit codes and damage that nobody
noticed, and `orphans`, processes that outlive their run. Exit code 1 if there is any. What is under way when the time
is over is finished first.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from malora_dist.files import path_argument
from malora_dist.parallel.device import without_expected_warnings
from tools.torture.findings import DONE, Findings


def main() -> None:
    arguments = _parse()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so do its runs
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that its runs end with it
    if arguments.directory:
        arguments.directory.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="malora-torture-", dir=arguments.directory))
    findings = Findings()
    findings.say(f"in {folder}, seed {arguments.seed}")
    with without_expected_warnings():  # imports megatron
        from tools.torture.rounds import torture

        torture(folder, findings, arguments.seed, arguments.minutes, arguments.jobs)
    if not findings.has_faults:
        shutil.rmtree(folder)
    print(findings.line, flush=True)
    sys.exit(int(findings.has_faults))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (10)")
    parser.add_argument("--seed", type=int, help="of the first job, the next has the next number; drawn by default")
    parser.add_argument("--jobs", nargs="+", choices=DONE, default=DONE, metavar="JOB", help=f"of {', '.join(DONE)}")
    parser.add_argument(
        "--directory",
        type=path_argument,
        help="for all of it; the system's temporary directory",
    )
    arguments = parser.parse_args()
    if arguments.seed is None:
        arguments.seed = random.SystemRandom().randrange(2**31)
    return arguments


if __name__ == "__main__":
    main()
