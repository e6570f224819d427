"""Scripts that compare cells on one domain with one of them: tuned learning rates, tables, JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from statistics import fmean
from typing import Any

from comparison import (
    compare,
    difference_table,
    losses,
    right,
    runs_for_json,
    score_table,
    tuning_table,
)
from experiment import Cell, Domain
from report import COLOURS, Report
from scales import parameters_of
from study import Study, Tuned, settings
from sweep import Result


def train_variants(
    study: Study, domain: Domain, cells: Sequence[Cell], tuned_as: Mapping[str, Cell] | None = None
) -> tuple[dict[str, Tuned], dict[str, list[Result]]]:
    """(learning rates, results), one per cell.

    Args:
        tuned_as: {cell: another whose learning rate it takes}; the cells not named are tuned themselves.
    """
    stands_in = {cell.name: (tuned_as or {}).get(cell.name, cell) for cell in cells}
    tuned_cells = list({cell.name: cell for cell in stands_in.values()}.values())
    tuned = study.tune(domain, tuned_cells)
    of_cell = {name: tuned[cell.name] for name, cell in stands_in.items()}
    return of_cell, study.train(domain, cells, of_cell)


def has_right(results: Mapping[str, Sequence[Result]]) -> bool:
    """Whether the tests have right answers, or losses alone."""
    return any("right" in scores for found in results.values() for scores in found[0]["tests"].values())


def variant_report(
    name: str,
    study: Study,
    domain: Domain,
    cells: Sequence[Cell],
    tuned: Mapping[str, Tuned],
    results: Mapping[str, list[Result]],
    reference: str,
) -> Report:
    """Scores, differences to the reference and learning rates; the script may add to it before it is written."""
    report = Report(name, study.title, study.out, settings(study))
    parameters = {cell.name: parameters_of(cell, domain) for cell in cells}
    columns = {}
    if has_right(results):
        score_table(report, "Right answers, %", results, parameters)
        columns["right, points"] = compare(results, reference)
    score_table(report, "Answer loss", results, parameters, losses)
    columns["answer loss x 100"] = compare(results, reference, losses)
    difference_table(report, f"{reference} minus the others, paired [95%]; bold: 0 lies outside", columns)
    tuning_table(report, tuned)
    report.keep(
        parameters=parameters,
        differences=columns,
        tuning={cell: one._asdict() for cell, one in tuned.items()},
        runs=runs_for_json(results),
    )
    return report


def draw_averages(axis: Any, results: Mapping[str, Sequence[Result]]) -> None:
    """A point per seed and a line at their mean, cells side by side."""
    for i, (scores, colour) in enumerate(zip(averages(results).values(), cycle(COLOURS), strict=False)):
        axis.scatter([i] * len(scores), scores, s=14, color=colour, alpha=0.6)
        axis.hlines(fmean(scores), i - 0.3, i + 0.3, color=colour)
    what = "right answers, %" if has_right(results) else "answer loss"
    axis.set_title(f"{what}: average over tests, a point per seed", fontsize=9)
    axis.set_xticks(range(len(results)), list(results), rotation=40, ha="right", fontsize=8)
    axis.grid(axis="y", alpha=0.3)


def averages(results: Mapping[str, Sequence[Result]]) -> dict[str, list[float]]:
    """{cell: average over tests of every seed}: right answers in per cent, or answer loss where there are none."""
    values, scale = (right, 100.0) if has_right(results) else (losses, 1.0)
    found = {}
    for name, of_cell in results.items():
        tables = list(values(of_cell).values())
        found[name] = [scale * sum(t[seed].mean() for t in tables) / len(tables) for seed in range(len(of_cell))]
    return found
