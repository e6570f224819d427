"""What the benchmarks share: the machine, repeated timings, tables, result files and the last line."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine(*packages: str) -> dict[str, Any]:
    """Hardware and versions of Python, torch and the named distributions."""
    cpu = next(
        (s.split(":")[1].strip() for s in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in s), ""
    )
    names = ("torch", *packages)
    return {
        "cpu": cpu or platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in names},
    }


def now(device: torch.device) -> float:
    """Seconds of a clock, when all that was started on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and extremes; of one value, five times that value."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": statistics.median(values), "q1": low, "q3": high, "min": min(values), "max": max(values)}


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, float]:
    """Summary of the ratios of two interleaved series, pair by pair, so that a slow moment hits both sides."""
    return summary([a / b for a, b in zip(numerators, denominators, strict=True)])


def spread(ratio: Mapping[str, float]) -> str:
    """Median and quartiles of a ratio."""
    return f"{ratio['median']:.3f} [{ratio['q1']:.3f} {ratio['q3']:.3f}]"


def interleaved(runs: Mapping[str, Callable[[], float]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Call every run once a round, in an order that turns by one each round; {name: figures after the warm-up}."""
    names = list(runs)
    figures: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warmup, rounds):
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]
            figure = runs[name]()
            if turn >= 0:
                figures[name].append(figure)
    return figures


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A plain table; the first column left-aligned, the others right-aligned."""
    cells = [list(map(str, row)) for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for row in cells:
        first, *rest = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join((first, *rest)).rstrip())


def command_of(script: str) -> str:
    """The command line that runs, from the project's root; of absolute paths the last part, as others lie elsewhere."""
    file = Path(script).resolve()
    options = [Path(option).name if Path(option).is_absolute() else option for option in sys.argv[1:]]
    return f"python tools/{file.parent.name}/{file.name} {shlex.join(options)}".strip()


def write_results(script: str, figures: Mapping[str, Any], *packages: str, output: Path | None = None) -> None:
    """Write ``results/<script>.json``: date, command (of absolute paths the last part), machine, then ``figures``.

    Args:
        script: the benchmark's ``__file__``.
        packages: distributions whose versions matter, besides torch.
        output: another file to write.
    """
    file = output or RESULTS / f"{Path(script).stem}.json"
    file.parent.mkdir(exist_ok=True)
    content = {"date": datetime.date.today().isoformat(), "command": command_of(script), **machine(*packages)}
    content |= figures
    file.write_text(json.dumps(content, indent=2) + "\n")


def headline(**figures: float | str) -> None:
    """The last line of a benchmark: ``key=value`` pairs. Keys with a slash are passed as ``**{"a/b": x}``."""
    print(
        " ".join(f"{key}={value if isinstance(value, str) else format(value, '.2f')}" for key, value in figures.items())
    )
