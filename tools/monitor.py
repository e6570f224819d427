"""Watch runs on a terminal, in progress or done, here or over ssh; several stand side by side.

    python tools/monitor.py RUN [RUN ...]

RUN is the `save` of a run, or its metrics.jsonl, which the logger jsonl writes. Ctrl-C ends. docs/monitoring.md says
what is shown.
"""

from __future__ import annotations

import argparse
import time

from rich.console import Console
from rich.live import Live

from malora_dist.errors import exit_on_user_error
from malora_dist.files import path_argument
from malora_dist.metrics.history import HistoryReader
from malora_dist.metrics.monitor import Monitor


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=path_argument, metavar="RUN", help="`save` of a run, or its file")
    parser.add_argument("--once", action="store_true", help="show one picture and end; so does output to a file")
    parser.add_argument("--interval", type=seconds, default=2.0, metavar="SECONDS", help="between two looks (2)")
    return parser


def seconds(text: str) -> float:
    """The type of ``--interval``."""
    value = float(text)
    if not 0.1 <= value <= 86400:
        raise argparse.ArgumentTypeError(f"{text} is not from 0.1 to 86400 seconds")
    return value


def watch(readers: list[HistoryReader], interval: float, console: Console) -> None:
    """Show the runs until the user interrupts; the last picture stays."""
    monitor = Monitor([reader.file for reader in readers])
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                histories = [reader.read() for reader in readers]
                live.update(monitor.draw(histories, time.time(), console, console.height), refresh=True)
                time.sleep(interval)
    except KeyboardInterrupt:
        show(readers, console)


def show(readers: list[HistoryReader], console: Console) -> None:
    """Print one picture."""
    monitor = Monitor([reader.file for reader in readers])
    console.print(monitor.draw([reader.read() for reader in readers], time.time(), console, height=None))


@exit_on_user_error
def main() -> None:
    """Show the runs once, or until the user interrupts."""
    arguments = build_parser().parse_args()
    readers = [HistoryReader(run) for run in arguments.runs]
    console = Console()
    if arguments.once or not console.is_terminal or console.is_dumb_terminal:
        show(readers, console)
    else:
        watch(readers, arguments.interval, console)


if __name__ == "__main__":
    main()
