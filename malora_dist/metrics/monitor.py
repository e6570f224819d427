"""Runs on a terminal: their progress, losses by task, balance of the experts, speed and warnings, runs side by side."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from malora_dist.metrics.history import History
from malora_dist.metrics.run_state import RunState, clock
from malora_dist.metrics.sparklines import TREND_WIDTH, Gauge, Heading, Trend

#: Of each run.
MOST_WARNINGS = 3
#: The widest column of labels.
LABEL_WIDTH = 20
#: Keys that differ between runs without making them different, or that are shown anyway.
NOT_COMPARED = {"save", "load", "tensorboard_dir", "data", "method"}
MOST_DIFFERING = 5

TRAINING = "lm loss"
VALIDATION = "lm loss validation"
ACCURACY = "accuracy validation"
TITLES = {TRAINING: "training", VALIDATION: "validation", ACCURACY: "accuracy"}
BALANCE = {
    "median load": "malora/balance/median",
    "90% load": "malora/balance/p90",
    "largest load": "malora/balance/max",
}


class Row(NamedTuple):
    """A label, and what stands beside it for each column."""

    label: str
    cells: Sequence[RenderableType]
    style: str = ""


class Monitor:
    """Draws runs.

    Args:
        files: their metrics.jsonl, in the order in which they are shown.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._names = run_names(files)

    def draw(self, histories: Sequence[History], now: float, console: Console, height: int | None) -> RenderableType:
        """A frame.

        Args:
            height: lines that there are; tasks that do not fit are left out and counted. None: as many as it takes.
        """
        runs = [RunState(name, history, now) for name, history in zip(self._names, histories, strict=True)]
        blocks = list(_blocks(runs, console.width))
        tasks = max(len(task_names(block)) for block in blocks)
        frame = Group(*(_draw_block(block, console.width, tasks) for block in blocks))
        lines = len(console.render_lines(frame))
        while height is not None and lines > height and tasks > 1:
            tasks -= 1
            frame = Group(*(_draw_block(block, console.width, tasks) for block in blocks))
            lines = len(console.render_lines(frame))
        return frame


def run_names(files: Sequence[Path]) -> list[str]:
    """A run's directory; of several what is not the same in all of them."""
    directories = [str(file.parent) for file in files]
    if len(set(directories)) < 2:
        return directories
    common = os.path.commonpath([os.path.abspath(directory) for directory in directories])
    names = [os.path.relpath(os.path.abspath(directory), common) for directory in directories]
    return directories if "." in names else names


def _blocks(runs: Sequence[RunState], width: int) -> Iterator[Sequence[RunState]]:
    """Runs that stand beside one another; there is room for so many columns."""
    columns = max((width - LABEL_WIDTH) // (TREND_WIDTH + 1), 1)
    for first in range(0, len(runs), columns):
        yield runs[first : first + columns]


def task_names(runs: Sequence[RunState]) -> list[str]:
    """All tasks of the runs, in the order of their configs."""
    return list(dict.fromkeys(task for run in runs for task in run.history.run.get("tasks", [])))


def _draw_block(runs: Sequence[RunState], width: int, most_tasks: int) -> RenderableType:
    tasks = task_names(runs)
    labels = [*tasks[:most_tasks], "validation  ", *BALANCE, "TFLOP/s/device"]
    label_width = min(max(len(label) for label in labels) + 2, LABEL_WIDTH)
    room = width - label_width
    losses = _losses_of_one if len(runs) == 1 and room >= 2 * (TREND_WIDTH + 2) else _losses_of_several
    parts = [
        _grid(list(_head(runs)), label_width, width),
        *_warnings(runs),
        _grid(list(losses(runs, tasks, most_tasks, room)), label_width, width),
        _grid(list(_experts(runs)), label_width, width),
        _grid(list(_speed(runs)), label_width, width),
    ]
    return Group(*parts)


def _grid(rows: Sequence[Row], label_width: int, width: int) -> RenderableType:
    """Rows below one another, their cells in columns of one width."""
    if not rows:
        return Group()
    columns = max(len(row.cells) for row in rows)
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(width=label_width - 2, no_wrap=True, overflow="ellipsis")
    for _ in range(columns):
        grid.add_column(width=(width - label_width) // columns - 2, no_wrap=True, overflow="ellipsis")
    for row in rows:
        grid.add_row(Text(row.label, style=row.style or "dim"), *row.cells)
    return grid


# ---- what a run is and where it is


def _head(runs: Sequence[RunState]) -> Iterator[Row]:
    yield Row("run", [Text(run.name, style="bold") for run in runs])
    yield Row("", [Text(_what(run.history.run)) for run in runs])
    configs = [_config(run) for run in runs]
    for key in differing_keys(configs)[:MOST_DIFFERING]:
        yield Row(key, [Text(str(config.get(key, ""))) for config in configs])
    yield Row("state", [Text(*run.describe()) for run in runs])
    yield Row("iteration", [Gauge(run.share, _progress(run), "cyan", text_width=18) for run in runs])
    yield from _texts(runs, "ETA", _eta)


def _what(run: dict[str, Any]) -> str:
    """``malora, 1.2M trained, 2 x cpu``"""
    if not run:
        return ""
    parameters = short(sum(run["parameters"].values()))
    return f"{run['config'].get('method', '?')}, {parameters} trained, {run['world_size']} x {run['device']}"


def _progress(run: RunState) -> str:
    return f"{run.iteration}/{run.last_iteration or '?'} {run.share:4.0%}"


def _eta(run: RunState) -> str:
    return "" if run.seconds_left is None else clock(run.seconds_left)


def differing_keys(configs: Sequence[dict[str, Any]]) -> list[str]:
    """Keys whose values are not the same in all configs."""
    keys = dict.fromkeys(key for config in configs for key in config if key not in NOT_COMPARED)
    return [key for key in keys if any(config.get(key) != configs[0].get(key) for config in configs)]


def _config(run: RunState) -> dict[str, Any]:
    config: dict[str, Any] = run.history.run.get("config", {})
    return config


def _warnings(runs: Sequence[RunState]) -> Iterator[RenderableType]:
    for run in runs:
        name = f"{run.name}, " if len(runs) > 1 else ""
        for step, text in run.history.warnings[-MOST_WARNINGS:]:
            yield Text(f"! {name}iteration {step}: {text}", style="yellow")


# ---- losses


def _losses_of_one(runs: Sequence[RunState], tasks: Sequence[str], most_tasks: int, width: int) -> Iterator[Row]:
    """Training, validation and, where there is room, accuracy beside one another; a row for each task."""
    (run,) = runs
    figures = [tag for tag in TITLES if tag in run.history.scalars]
    figures = figures[: width // (TREND_WIDTH + 2)]
    if not figures:
        return
    yield Row("losses", [Heading(TITLES[tag]) for tag in figures], style="bold")
    yield Row("all tasks", [_loss(run, tag) for tag in figures])
    for task in tasks[:most_tasks]:
        yield Row(task, [_loss(run, f"{tag}/{task}") for tag in figures])
    if len(tasks) > most_tasks:
        yield Row(f"and {len(tasks) - most_tasks} more", [])
    if ACCURACY not in figures:
        yield from _trends(runs, "accuracy", ACCURACY, _loss)
    yield from _learning(runs)


def _losses_of_several(runs: Sequence[RunState], tasks: Sequence[str], most_tasks: int, width: int) -> Iterator[Row]:
    """A column for each run; of each task a row for training and one for validation."""
    yield Row("losses", [Heading("") for _ in runs], style="bold")
    for label, suffix in (("all tasks", ""), *((task, f"/{task}") for task in tasks[:most_tasks])):
        for name, tag in ((label, TRAINING), ("  validation", VALIDATION)):
            yield from _trends(runs, name, tag + suffix, _loss)
    if len(tasks) > most_tasks:
        yield Row(f"and {len(tasks) - most_tasks} more", [])
    yield from _trends(runs, "accuracy", ACCURACY, _loss)
    yield from _learning(runs)


def _learning(runs: Sequence[RunState]) -> Iterator[Row]:
    yield from _trends(runs, "learning rate", "learning-rate", lambda run, tag: _trend(run, tag, scientific))
    yield from _trends(runs, "gradient norm", "grad-norm", lambda run, tag: _trend(run, tag, short))


def _trends(
    runs: Sequence[RunState], label: str, tag: str, cell: Callable[[RunState, str], RenderableType]
) -> Iterator[Row]:
    """A row, if a run has the tag."""
    if any(tag in run.history.scalars for run in runs):
        yield Row(label, [cell(run, tag) for run in runs])


def _loss(run: RunState, tag: str) -> Trend:
    if tag.startswith(ACCURACY):
        return _trend(run, tag, "{:.1%}".format, max)
    return _trend(run, tag, short, min, is_logarithmic=True)


def _trend(
    run: RunState,
    tag: str,
    shown: Callable[[float], str],
    best: Callable[[Sequence[float]], float] | None = None,
    is_logarithmic: bool = False,
) -> Trend:
    return Trend(list(run.history.scalars.get(tag, {}).values()), shown, best, is_logarithmic)


def short(value: float) -> str:
    """In at most 6 characters: ``4.0e-5``, ``0.0123``, ``0.070``, ``12.345``, ``12,345``, ``123k``, ``1.2M``."""
    size = abs(value)
    if not math.isfinite(value) or size >= 1e18:
        return f"{value:.0e}"
    if size >= 1e5:
        exponent = int(math.log10(size)) // 3
        scaled = value / 1000**exponent
        return f"{scaled:.{1 if abs(scaled) < 10 else 0}f}{' kMGTP'[exponent]}"
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 100:
        return f"{value:.1f}"
    if 0 < size < 0.001:
        return scientific(value)
    return f"{value:.3f}" if size >= 0.01 or size == 0 else f"{value:.4f}"


def scientific(value: float) -> str:
    """``4.0e-5``"""
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


# ---- experts and speed


def _experts(runs: Sequence[RunState]) -> Iterator[Row]:
    if not any("malora/balance/max" in run.history.scalars for run in runs):
        return
    yield Row("experts", [Text("busiest over mean; 1 is even", style="dim")], style="bold")
    for label, tag in BALANCE.items():
        yield Row(label, [_load(run, tag) for run in runs])
    yield Row("effective", [_effective(run) for run in runs])
    yield Row("dead", [_dead(run) for run in runs])


def _last(run: RunState, tag: str) -> float | None:
    series = run.history.scalars.get(tag)
    return next(reversed(series.values())) if series else None


def _num_experts(run: RunState) -> int:
    return int(_config(run).get("num_lora_experts", 1))


def _load(run: RunState, tag: str) -> RenderableType:
    value, experts = _last(run, tag), _num_experts(run)
    if value is None:
        return ""
    share = (value - 1) / max(experts - 1, 1)
    return Gauge(share, f"{value:.2f} of {experts}", _style(share, 0.25, 0.5))


def _effective(run: RunState) -> RenderableType:
    share, experts = _last(run, "malora/effective experts"), _num_experts(run)
    return "" if share is None else Gauge(share, f"{share * experts:.2f} of {experts}", _style(1 - share, 0.25, 0.5))


def _dead(run: RunState) -> RenderableType:
    share = _last(run, "malora/dead experts")
    return "" if share is None else Gauge(share, f"{share:.1%}", _style(share, 0.0, 0.1))


def _style(badness: float, yellow: float, red: float) -> str:
    return "red" if badness > red else "yellow" if badness > yellow else "green"


def _speed(runs: Sequence[RunState]) -> Iterator[Row]:
    yield Row("speed", [Heading("") for _ in runs], style="bold")
    for label, tag, best in (
        ("tokens/s", "tokens-per-second", max),
        ("s/iteration", "iteration-time", min),
        ("TFLOP/s/device", "throughput", max),
        ("MFU", "mfu", max),
    ):
        yield from _trends(runs, label, tag, lambda run, tag, best=best: _trend(run, tag, short, best))  # type: ignore[misc]
    yield from _texts(runs, "time", _time)
    yield from _texts(runs, "memory", _memory)
    yield from _texts(runs, "skipped steps", _skipped)


def _texts(runs: Sequence[RunState], label: str, text: Callable[[RunState], str]) -> Iterator[Row]:
    """A row, if a run has a text."""
    texts = [text(run) for run in runs]
    if any(texts):
        yield Row(label, [Text(text) for text in texts])


def _time(run: RunState) -> str:
    """``compute 71%  ep 12%  data 4%``, the largest first."""
    prefix = "time share/"
    shares = {tag.removeprefix(prefix): _last(run, tag) or 0.0 for tag in run.history.scalars if tag.startswith(prefix)}
    largest = sorted(shares.items(), key=lambda item: -item[1])
    return "  ".join(f"{name} {share:.0%}" for name, share in largest if share >= 0.005)


def _memory(run: RunState) -> str:
    peak = _last(run, "memory/peak GiB")
    return "" if peak is None else f"peak {peak:.2f} GiB"


def _skipped(run: RunState) -> str:
    skipped = sum(run.history.scalars.get("skipped-iterations", {}).values())
    return f"{skipped:.0f}" if skipped else ""
