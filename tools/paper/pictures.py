"""What the scripts draw: a point per seed or test, and scores over the number of trained parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiment import Cell, Domain
from report import COLOURS, Report
from scales import parameters_of


def points(axis: Any, by_cell: Mapping[str, Sequence[float]], title: str, with_mean: bool = True) -> None:
    """A column of points per cell, with their mean as a line."""
    for i, numbers in enumerate(by_cell.values()):
        colour = COLOURS[i % len(COLOURS)]
        axis.scatter([i] * len(numbers), numbers, s=14, color=colour, alpha=0.6)
        if with_mean:
            axis.hlines(sum(numbers) / len(numbers), i - 0.3, i + 0.3, color=colour)
    axis.set_title(title, fontsize=9)
    axis.set_xticks(range(len(by_cell)), list(by_cell), rotation=40, ha="right", fontsize=8)
    axis.grid(axis="y", alpha=0.3)


def over_size(
    report: Report, domain: Domain, cells: Mapping[str, Sequence[Cell]], scores: Mapping[str, Sequence[float]]
) -> None:
    """Scores over trained parameters, a line per method and a point per seed.

    Args:
        cells: {method: its cells, from small to large}.
        scores: {cell: a score per seed}.
    """
    _, axis = report.figure(height=3.2)
    for colour, (method, of_method) in zip(COLOURS, cells.items(), strict=False):
        sizes = [parameters_of(cell, domain) for cell in of_method]
        means = [sum(scores[cell.name]) / len(scores[cell.name]) for cell in of_method]
        axis.plot(sizes, means, color=colour, label=method)
        for size, cell in zip(sizes, of_method, strict=True):
            axis.scatter([size] * len(scores[cell.name]), scores[cell.name], s=10, color=colour, alpha=0.5)
    axis.set_xscale("log")
    axis.set_xlabel("trained parameters")
    axis.set_ylabel("average over tests")
    axis.grid(alpha=0.3)
    axis.legend()
