"""The parameter counts of tables 1 and 3, the claims built on them, and the rank rule. Nothing is trained.

    python tools/paper/parameters.py

Counted on the shapes of LLaMA-2 7B, which the paper adapts, and of Llama-3 8B, at the ranks of the paper whatever the
scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from ablations import ablation_cells
from experiment import Cell
from report import COLOURS, Report
from scales import SCALES, adapter_keys, candidate_of
from study import Study, build_parser

from malora_dist.errors import exit_on_user_error
from malora_dist.families.base import projection_widths
from malora_dist.families.shapes import SHAPES, base_parameters, released_config
from malora_dist.methods.budget import rank_rule, total
from malora_dist.methods.comparison import Base, Candidate

MALORA = Cell("MALoRA", adapter_keys("malora", 12, shared_dim=32))


@dataclass(frozen=True)
class Row:
    """A row of table 1.

    Attributes:
        percent: trained, as the paper gives it; None: it does not.
    """

    cell: Cell
    percent: float | None


TABLE_1 = (
    Row(Cell("LoRA", adapter_keys("lora", 64)), 2.1),
    Row(Cell("AsyLoRA", adapter_keys("asymmetric_lora", 128)), 2.2),
    Row(Cell("DoRA", adapter_keys("dora", 64)), 2.1),
    Row(Cell("MoAsyLoRA", adapter_keys("mo_asymmetric_lora", 16)), None),
    Row(Cell("MoLoRA", adapter_keys("molora", 8)), 2.2),
    Row(Cell("MALoRA-Small", adapter_keys("malora", 8, shared_dim=22)), 1.6),
    Row(MALORA, 2.3),
)
#: The paper's rule for MoLoRA of rank 8: {lambda: (d, rank)}.
RULE = {0.25: (16, 14), 0.5: (32, 12), 0.75: (48, 10), 1.0: (64, 8)}
#: What the paper says is saved, in per cent: (text, smaller cell, larger cell, per cent).
CLAIMS = (
    ("MALoRA-Small against MoLoRA r 8", TABLE_1[5].cell, TABLE_1[4].cell, 30),
    ("MALoRA r 12 against MoLoRA r 16", MALORA, Cell("MoLoRA r 16", adapter_keys("molora", 16)), 48),
)


def base_of(shape: str) -> Base:
    """A released model, for counting."""
    hf = released_config(shape)
    return Base(projection_widths(hf), hf.num_hidden_layers, base_parameters(hf))


def agreement(candidate: Candidate, percent: float | None) -> str:
    """Which of our shares rounds to the paper's."""
    if percent is None:
        return ""
    shares = {"of base": candidate.figures["of_base"], "of base + adapter": candidate.figures["of_all"]}
    return ", ".join(name for name, share in shares.items() if round(100 * share, 1) == percent) or "**neither**"


def counts(candidate: Candidate) -> list[str]:
    """Millions, and their shares in per cent."""
    figures = candidate.figures
    return [f"{figures['total'] / 1e6:.1f}", f"{figures['of_base']:.2%}", f"{figures['of_all']:.2%}"]


def widths(cell: Cell) -> list[object]:
    """Rank and d."""
    return [cell.keys["lora_rank"], cell.keys.get("shared_dim", "")]


def saved(smaller: Candidate, larger: Candidate, with_router: bool) -> float:
    """Of the larger one's trained parameters, in per cent."""
    few, many = (
        total(one.spec, one.base.widths, one.base.num_layers, with_router=with_router) for one in (smaller, larger)
    )
    return 100 * (1 - few / many)


def count_tables(report: Report, bases: Mapping[str, Base]) -> None:
    """Tables 1 and 3: a row per method, columns of each shape; the paper has a figure of the first shape only."""
    each = [f"{shape}: {what}" for shape in bases for what in ("M trained", "of base", "of base + adapter")]
    rows, figures = [], []
    for row in TABLE_1:
        found = [candidate_of(row.cell, base) for base in bases.values()]
        paper = "" if row.percent is None else f"{row.percent}%"
        cells = [cell for one in found for cell in counts(one)]
        rows.append([row.cell.name, *widths(row.cell), *cells, paper, agreement(found[0], row.percent)])
        figures += [one.figures | {"shape": shape} for shape, one in zip(bases, found, strict=True)]
    report.table("Table 1: parameters", ["", "r", "d", *each, "paper", "agrees"], rows)
    ablations = ablation_cells(SCALES["gpu"], MALORA)
    rows = [
        [cell.name, *widths(cell), *(c for base in bases.values() for c in counts(candidate_of(cell, base)))]
        for cell in ablations
    ]
    report.table("Table 3: parameters", ["", "r", "d", *each], rows)
    report.keep(table_1=figures)


def claim_table(report: Report, bases: Mapping[str, Base]) -> None:
    """What MALoRA saves, with and without the routers."""
    rows = []
    for text, smaller, larger, claimed in CLAIMS:
        for shape, base in bases.items():
            pair = candidate_of(smaller, base), candidate_of(larger, base)
            without, everything = (saved(*pair, with_router=with_router) for with_router in (False, True))
            paper = f"{claimed}%" if base is next(iter(bases.values())) else ""
            rows.append([text, shape, f"{without:.1f}%", f"{everything:.1f}%", paper])
    report.table("Parameters saved", ["", "shape", "without routers", "with routers", "paper"], rows)


def rule_table(report: Report, bases: Mapping[str, Base]) -> None:
    """The rank rule for MoLoRA of rank 8."""
    molora = {shape: candidate_of(Cell("MoLoRA", adapter_keys("molora", 8)), base) for shape, base in bases.items()}
    rows = [["MoLoRA r 8", "", 8, "", *(text for one in molora.values() for text in (f"{one.total / 1e6:.1f}", "1"))]]
    for share, papers in RULE.items():
        shared_dim, rank = rank_rule(8, 8, share)
        cells: list[object] = [f"MALoRA, lambda {share:g}", shared_dim, rank]
        cells.append("yes" if (shared_dim, rank) == papers else f"**no: {papers}**")
        for shape, base in bases.items():
            found = candidate_of(Cell("MALoRA", adapter_keys("malora", rank, shared_dim=shared_dim)), base)
            cells += [f"{found.total / 1e6:.1f}", f"{found.total / molora[shape].total:.3f}"]
        rows.append(cells)
    each = [f"{shape}: {what}" for shape in bases for what in ("M trained", "to MoLoRA")]
    report.table("Rank rule (section 3.3), N 8", ["", "d", "r", "as in the paper", *each], rows)


def picture(report: Report, bases: Mapping[str, Base]) -> None:
    """A bar per method, stacked by kind of parameter; a panel per shape."""
    figure, axes = report.figure(columns=len(bases))
    for axis, (shape, base) in zip(axes, bases.items(), strict=True):
        trained = [candidate_of(row.cell, base).figures["trained"] for row in TABLE_1]
        kinds = sorted({kind for of_method in trained for kind in of_method})
        bottom = np.zeros(len(trained))
        for kind, colour in zip(kinds, COLOURS, strict=False):
            height = np.array([of_method.get(kind, 0) / 1e6 for of_method in trained])
            axis.bar(range(len(trained)), height, bottom=bottom, color=colour, label=kind, width=0.7)
            bottom += height
        axis.set_xticks(range(len(trained)), [row.cell.name for row in TABLE_1], rotation=40, ha="right", fontsize=8)
        axis.set_title(f"{shape}: trained parameters, millions", fontsize=9)
        axis.grid(axis="y", alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)


@exit_on_user_error
def main() -> None:
    """Count and write."""
    args = build_parser(__doc__ or "").parse_args()
    study = Study(args, "Parameters")
    bases: dict[str, Base] = {shape: base_of(shape) for shape in SHAPES}
    shapes: dict[str, Any] = {shape: {"parameters": base.parameters} for shape, base in bases.items()}
    report = Report("parameters", study.title, study.out, {"shapes": shapes})
    report.say(
        "The paper counts LLaMA-2 7B and gives one decimal. Routers are included, o_proj is not adapted, and what is "
        "frozen (AsyLoRA's A) is not counted as trained but is part of base + adapter."
    )
    count_tables(report, bases)
    claim_table(report, bases)
    rule_table(report, bases)
    picture(report, bases)
    report.write()


if __name__ == "__main__":
    main()
