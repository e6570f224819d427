"""Cells against each other: scores per test, paired differences, the seesaw, and the tables that show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from bootstrap import Draws, Interval, Values, average, difference, draws_for, stack, worst
from report import Report
from study import Tuned
from sweep import Result

#: {cell: results, one per seed}.
Results = Mapping[str, Sequence[Result]]


def right(results: Sequence[Result]) -> dict[str, np.ndarray]:
    """{test: [seeds, questions] 1 where the answer is right}, of the tests that have right answers."""
    return stack([
        {test: [float(one) for one in scores["right"]] for test, scores in result["tests"].items() if "right" in scores}
        for result in results
    ])  # fmt: skip


def losses(results: Sequence[Result]) -> dict[str, np.ndarray]:
    """{test: [seeds, questions] mean answer loss of each question}."""
    return stack([{test: scores["losses"] for test, scores in result["tests"].items()} for result in results])


def merged(results: Sequence[Sequence[Result]]) -> list[Result]:
    """Single-task runs, a list per task with a result per seed, as results that have all tests."""
    return [
        {"seed": by_task[0]["seed"], "tests": {test: s for result in by_task for test, s in result["tests"].items()}}
        for by_task in zip(*results, strict=True)
    ]


def has_right(results: Mapping[str, Sequence[Result]]) -> bool:
    """Whether the tests have right answers, or losses alone."""
    return any("right" in scores for found in results.values() for scores in found[0]["tests"].values())


def averages(results: Mapping[str, Sequence[Result]]) -> dict[str, list[float]]:
    """{cell: average over tests of every seed}: right answers in per cent, or answer loss where there are none."""
    values, scale = (right, 100.0) if has_right(results) else (losses, 1.0)
    found = {}
    for name, of_cell in results.items():
        tables = list(values(of_cell).values())
        found[name] = [scale * sum(t[seed].mean() for t in tables) / len(tables) for seed in range(len(of_cell))]
    return found


def compare(results: Results, reference: str, values: Any = right) -> dict[str, Interval]:
    """{other cell: average over tests of the reference minus that of the cell}, paired, 95% intervals."""
    own = values(results[reference])
    draws = draws_for(own)
    return {
        name: draws.interval(difference(own, values(found)), average)
        for name, found in results.items()
        if name != reference
    }


def seesaw(results: Results, single: Sequence[Result], values: Any = right) -> dict[str, tuple[Interval, Interval]]:
    """{cell: (mean, worst) over the tests of its score minus that of a LoRA trained on the test's task alone}.

    Of losses the sign is turned, so that less is worse throughout.
    """
    alone = values(single)
    sign = 1 if values is right else -1
    draws = draws_for(alone)
    found = {}
    for name, of_cell in results.items():
        change = {test: sign * table for test, table in difference(values(of_cell), alone).items()}
        found[name] = (draws.interval(change, average), draws.interval(change, worst))
    return found


def worst_test(results: Results, reference: str) -> dict[str, Interval]:
    """{other cell: right answers in the reference's worst test minus those in the cell's worst}."""
    own = right(results[reference])
    draws = draws_for(own)
    observed, resampled = draws.means(own)
    return {
        name: _interval_of_difference(worst(observed), worst(resampled), draws, right(found))
        for name, found in results.items()
        if name != reference
    }


def score_table(
    report: Report, title: str, results: Results, parameters: Mapping[str, int], values: Any = right
) -> None:
    """A row per cell: every test's score and their average with its interval."""
    per_cent = values is right
    scale, digits = (100.0, 1) if per_cent else (1.0, 3)
    tables = {name: values(found) for name, found in results.items()}
    tests = list(next(iter(tables.values())))
    rows = []
    for name, table in tables.items():
        mean = draws_for(table).interval(table, average)
        cells = [f"{scale * table[test].mean():.{digits}f}" for test in tests]
        count = f"{parameters[name]:,}" if name in parameters else ""
        rows.append([name, count, *cells, mean.text(digits, scale, signed=False)])
    report.table(title, ["", "trained", *tests, "average [95%]"], rows)


def difference_table(report: Report, title: str, differences: Mapping[str, Mapping[str, Interval]]) -> None:
    """A row per cell, a column per kind of difference, in percentage points; bold where the interval excludes 0."""
    header = ["", *differences]
    names = list(dict.fromkeys(name for column in differences.values() for name in column))
    rows = [[name, *(_bold(column.get(name)) for column in differences.values())] for name in names]
    report.table(title, header, rows)


def pair_table(report: Report, title: str, results: Results, pairs: Sequence[tuple[str, str]]) -> None:
    """The first cell of every pair minus the second, paired; also in the JSON."""
    found: dict[str, dict[str, Interval]] = {}
    kinds = ((right, "right, points"),) if has_right(results) else ()
    for values, kind in (*kinds, (losses, "answer loss x 100")):
        found[kind] = {
            f"{name} minus {other}": compare({name: results[name], other: results[other]}, name, values)[other]
            for name, other in pairs
        }
    report.keep(**{title: found})
    difference_table(report, title, found)


def tuning_table(report: Report, tuned: Mapping[str, Tuned]) -> None:
    """A row per cell: validation loss at every learning rate of the grid."""
    lrs = sorted({lr for one in tuned.values() for lr in one.losses})
    rows = [[name, *(_tuned_cell(one, lr) for lr in lrs), "yes" if one.at_edge else ""] for name, one in tuned.items()]
    header = ["", *(f"{lr:g}" for lr in lrs), "at the grid's edge"]
    report.table("Learning rates: validation answer loss, mean over tasks and tuning seeds", header, rows)


def runs_for_json(results: Results) -> list[dict[str, Any]]:
    """Every run with its scores per test, without the single questions."""
    return [
        {"cell": name}
        | {key: result[key] for key in ("keys", "lr", "seed", "tasks", "seconds", "curve") if key in result}
        | {"tests": {test: _short(scores) for test, scores in result["tests"].items()}}
        for name, found in results.items()
        for result in found
    ]


def _short(scores: Mapping[str, Any]) -> dict[str, float]:
    short = {"questions": scores["questions"], "loss": scores["loss"] / scores["tokens"]}
    if "right" in scores:
        short["right"] = scores["right"].count("1") / scores["questions"]
    return short


def _interval_of_difference(own: Any, own_resampled: Any, draws: Draws, other: Values) -> Interval:
    observed, resampled = draws.means(other)
    low, high = np.quantile(own_resampled - worst(resampled), (0.025, 0.975))
    return Interval(float(own - worst(observed)), float(low), float(high))


def _bold(interval: Interval | None) -> str:
    if interval is None:
        return ""
    text = interval.text(1, 100.0)
    return f"**{text}**" if interval.excludes_zero else text


def _tuned_cell(tuned: Tuned, lr: float) -> str:
    if lr not in tuned.losses:
        return ""
    return f"**{tuned.losses[lr]:.3f}**" if lr == tuned.lr else f"{tuned.losses[lr]:.3f}"
