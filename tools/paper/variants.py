"""Scripts that compare cells on one domain with one of them: tuned learning rates, tables, JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from comparison import (
    averages,
    compare,
    difference_table,
    has_right,
    losses,
    runs_for_json,
    score_table,
    tuning_table,
)
from experiment import Cell, Domain
from pictures import points
from report import Report
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
    _, axis = report.figure(width=2)
    points(axis, averages(results), "average over tests, a point per seed")
    report.keep(
        parameters=parameters,
        differences=columns,
        tuning={cell: one._asdict() for cell, one in tuned.items()},
        runs=runs_for_json(results),
    )
    return report
