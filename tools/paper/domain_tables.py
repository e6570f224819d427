"""Tables 1, 2 and 7 of the paper: every method on one domain at equal parameter counts, and single-task LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bootstrap import Interval
from comparison import (
    averages,
    compare,
    difference_table,
    has_right,
    losses,
    merged,
    right,
    runs_for_json,
    score_table,
    seesaw,
    tuning_table,
    worst_test,
)
from experiment import Cell, Domain, Task
from pictures import points
from report import Report
from scales import paper_cells, parameters_of
from study import Study, Tuned, build_parser, settings
from sweep import Result

from malora_dist.data.records import read_records


def compare_methods(domain_name: str, title: str, description: str) -> None:
    """Train, compare and write; the whole of inter_domain.py and intra_domain.py."""
    parser = build_parser(description)
    parser.add_argument("--cells", nargs="+", metavar="NAME", help="only these methods, by their names in the table")
    args = parser.parse_args()
    with Study(args, title) as study:
        domain = study.domain(domain_name)
        cells = paper_cells(study.scale, domain)
        unknown = sorted(set(args.cells or ()) - set(cells))
        if unknown:
            parser.error(f"--cells {' '.join(unknown)}: the table has {', '.join(cells)}")
        chosen = [cell for name, cell in cells.items() if not args.cells or name in args.cells]
        tuned = study.tune(domain, chosen)
        results = study.train(domain, chosen, tuned)
        if "LoRA" not in tuned:
            tuned |= study.tune(domain, [cells["LoRA"]])
        keeps_adapter = study.scale.name == "tiny"
        single, single_tuned = single_tasks(study, domain, cells["LoRA"], tuned["LoRA"], keeps_adapter)
    report = Report(domain_name, title, study.out, settings(study))
    _write(report, domain, chosen, tuned, results, single, single_tuned)


def single_tasks(
    study: Study, domain: Domain, lora: Cell, on_mixture: Tuned, keeps_adapter: bool = False
) -> tuple[list[Result], dict[str, Tuned]]:
    """LoRA trained on every task alone, with as many of its samples as in the mixture: (a result per seed, rates).

    Args:
        on_mixture: its learning rate there, which it takes where the scale does not tune it for every task.
        keeps_adapter: for similarity.py, which looks into the adapters of the same runs.
    """
    names = [task.name for task in domain.tasks]
    pairs = [(domain.only(name), lora) for name in names]
    tuned = study.tune_all(pairs, names) if study.scale.tunes_single else dict.fromkeys(names, on_mixture)
    found = study.train_all(pairs, names, tuned, keeps_adapter)
    return merged(list(found.values())), tuned


def _write(
    report: Report,
    domain: Domain,
    cells: Sequence[Cell],
    tuned: dict[str, Tuned],
    results: dict[str, list[Result]],
    single: list[Result],
    single_tuned: dict[str, Tuned],
) -> None:
    parameters = {cell.name: parameters_of(cell, domain) for cell in cells}
    everything = {"LoRA, one task each": single, **results}
    are_answers = has_right(everything)
    if are_answers:
        score_table(report, "Right answers, %", everything, parameters)
    score_table(report, "Answer loss", everything, parameters, losses)
    references = [name for name in ("MALoRA", "MALoRA-Small") if name in results] or list(results)[:1]
    differences = {reference: _differences(report, results, reference) for reference in references}
    changes = {"right, points": seesaw(results, single)} if are_answers else {}
    changes["answer loss"] = seesaw(results, single, losses)
    _seesaw_table(report, changes)
    report.table("Label tokens", ["task", "training samples", "label tokens", "per sample"], label_tokens(domain))
    tuning_table(report, tuned | {f"LoRA, {task} alone": one for task, one in single_tuned.items()})
    _picture(report, results, single, right if are_answers else losses)
    report.keep(
        parameters=parameters,
        differences=differences,
        seesaw=changes,
        tuning={name: one._asdict() for name, one in (tuned | single_tuned).items()},
        runs=runs_for_json(everything),
    )
    report.write()


def _differences(report: Report, results: dict[str, list[Result]], reference: str) -> dict[str, dict[str, Interval]]:
    """The table of a method minus the others: {what: {other: difference}}."""
    columns = {}
    if has_right(results):
        columns["right, points"] = compare(results, reference)
        columns["right in the worst test, points"] = worst_test(results, reference)
    columns["answer loss x 100"] = compare(results, reference, losses)
    difference_table(report, f"{reference} minus the others, paired [95%]; bold: 0 lies outside", columns)
    return columns


def _seesaw_table(report: Report, changes: dict[str, dict[str, tuple[Interval, Interval]]]) -> None:
    """A row per method, mean and worst change of each kind of score."""
    header = ["", *(f"{what}: {which}" for what in changes for which in ("mean", "worst"))]
    rows = []
    for name in next(iter(changes.values())):
        texts = []
        for what, by_cell in changes.items():
            scale, digits = (100.0, 1) if what.startswith("right") else (1.0, 3)
            texts += [interval.text(digits, scale) for interval in by_cell[name]]
        rows.append([name, *texts])
    report.table("Seesaw: change against a LoRA of the task alone; more is better", header, rows)


def label_tokens(domain: Domain) -> list[list[object]]:
    """The paper's table 7: how much each task gives to learn from. Counted as training counts, EOS included."""
    from transformers import AutoTokenizer

    from malora_dist.checkpoint.base import hf_dir

    tokenizer = AutoTokenizer.from_pretrained(str(hf_dir(domain.base)))
    return [[task.name, *_label_tokens(task, tokenizer)] for task in domain.tasks]


def _label_tokens(task: Task, tokenizer: Any) -> tuple[str, str, str]:
    answers = [record["completion"] for _, record in read_records(str(task.train))]
    tokens = sum(len(ids) + 1 for ids in tokenizer(answers, add_special_tokens=False).input_ids)
    return f"{len(answers):,}", f"{tokens:,}", f"{tokens / len(answers):.1f}"


def _picture(report: Report, results: dict[str, list[Result]], single: list[Result], values: Any) -> None:
    """Left: averages, a point per seed. Right: every test's change against a LoRA of the task alone."""
    sign, scale, what = (1, 100, "right answers, %") if values is right else (-1, 1, "answer loss")
    _, (left, seesaws) = report.figure(columns=2)
    alone = values(single)
    changes = {}
    for name, of_cell in results.items():
        table = values(of_cell)
        changes[name] = [sign * scale * (table[test].mean() - alone[test].mean()) for test in table]
    points(left, averages(results), f"{what}: average over tests, a point per seed")
    points(seesaws, changes, f"{what}: gain on one LoRA per task, a point per test")
    seesaws.axhline(0, color="black", linewidth=0.8)
