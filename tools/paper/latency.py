"""Figure 4c and table 10: forward, backward and optimizer of a training step, as ratios to LoRA's.

    python tools/paper/latency.py --scale small
    python tools/paper/latency.py --scale gpu --options --layers 4

Measured by tools/benchmarks/step_time.py at the paper's ranks, on random Llamas: no model or data is needed. Its own
figures are kept beside the report. At the scale tiny the model is too small for the ratios to mean anything.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from report import COLOURS, Report
from study import ROOT, Study, build_parser

from malora_dist.errors import exit_on_user_error

PARTS = ("forward", "backward", "optimizer")


class Row(NamedTuple):
    """A method, as step_time.py and the tables call it.

    Attributes:
        paper: its seconds of each part of a step in table 10.
    """

    method: str
    name: str
    paper: tuple[float, float, float]

    @property
    def paper_step(self) -> float:
        return sum(self.paper)


LORA = Row("lora", "LoRA", (4.246, 9.229, 0.188))
_DORA, _MOLORA = (4.973, 11.514, 0.240), (4.649, 11.902, 1.017)
#: The paper measures on FastMoE and, it seems, DoRA as PEFT computes it: there ours have two rows.
ROWS = (
    LORA,
    Row("usual_dora", "DoRA, as in PEFT", _DORA),
    Row("dora", "DoRA", _DORA),
    Row("usual_molora", "MoLoRA, as in FastMoE", _MOLORA),
    Row("molora", "MoLoRA", _MOLORA),
    Row("malora", "MALoRA", (4.288, 9.523, 0.876)),
)
#: step_time.py's options at each scale.
OPTIONS = {
    "tiny": "--hidden 128 --tokens 64 --rounds 2 --threads 1",
    "small": "--hidden 2048",
    "gpu": "--device cuda --bf16 --shape llama2-7b --tokens 16384 --seq-length 2048",
}


def command_for(scale: str, more: list[str], output: Path) -> list[str]:
    """Of step_time.py."""
    command = [sys.executable, str(ROOT / "tools" / "benchmarks" / "step_time.py"), "--setting", "paper", "--no-memory"]
    methods = [row.method for row in ROWS]
    return [*command, *OPTIONS[scale].split(), *more, "--methods", *methods, "--output", str(output)]


def measure(scale: str, more: list[str], output: Path) -> dict[str, Any]:
    """What step_time.py writes."""
    output.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(command_for(scale, more, output), check=True)
    found: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return found


def parts_of(figures: dict[str, Any]) -> list[float]:
    """Median seconds of the parts."""
    return [figures[f"{part}_seconds"]["median"] for part in PARTS]


def ratio_table(report: Report, model: str, figures: dict[str, Any]) -> None:
    """A row per method: ours and the paper's ratio of every part, and what the operations alone would give."""
    header = ["", *(text for part in (*PARTS, "step") for text in (f"{part}: ours", "paper")), "operations alone"]
    rows = []
    for row in ROWS:
        own = figures[row.method]
        cells = []
        ours = zip(parts_of(own), parts_of(figures[LORA.method]), row.paper, LORA.paper, strict=True)
        for seconds, of_lora, paper, papers_lora in ours:
            cells += [f"{seconds / of_lora:.3f}", f"{paper / papers_lora:.3f}"]
        step = own["to_lora"]
        cells += [f"{step['median']:.3f} [{step['q1']:.3f}, {step['q3']:.3f}]"]
        cells += [f"{row.paper_step / LORA.paper_step:.3f}", f"{own['floor']:.3f}"]
        rows.append([row.name, *cells])
    report.table(f"Ratios to LoRA, {model}; step: median of rounds [quartiles]", header, rows)


def picture(report: Report, by_model: dict[str, Any]) -> None:
    """A stacked bar per method, LoRA's whole step being 1: a panel per model, and the paper's."""
    shares = {
        model: np.array([parts_of(figures[row.method]) for row in ROWS])
        / figures[LORA.method]["seconds"]["median"]
        for model, figures in by_model.items()
    }  # fmt: skip
    shares["the paper, 4 A100"] = np.array([row.paper for row in ROWS]) / LORA.paper_step
    figure, axes = report.figure(columns=len(shares))
    for axis, (title, of_rows) in zip(axes, shares.items(), strict=True):
        bottom = np.zeros(len(ROWS))
        for part, height, colour in zip(PARTS, of_rows.T, COLOURS, strict=False):
            axis.bar(range(len(ROWS)), height, 0.7, bottom=bottom, color=colour, label=part)
            bottom += height
        axis.set_xticks(range(len(ROWS)), [row.name for row in ROWS], rotation=40, ha="right", fontsize=8)
        axis.set_title(title, fontsize=9)
        axis.grid(axis="y", alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)


@exit_on_user_error
def main() -> None:
    """Measure and write."""
    parser = build_parser(__doc__ or "")
    parser.add_argument(
        "--options", nargs=argparse.REMAINDER, default=[], help="more of step_time.py; has to come last"
    )
    args = parser.parse_args()
    study = Study(args, "Latency")
    output = study.out / "latency_step_time.json"
    measured = measure(args.scale, args.options, output)
    by_model = {f"hidden {name}" if name.isdigit() else name: of for name, of in measured.pop("figures").items()}
    report = Report("latency", study.title, study.out, measured)
    report.say(
        "A step is forward, backward and optimizer (with gradient clipping) of frozen and trained parts together. The "
        "paper's figures are of a LLaMA-2 7B, 16,384 tokens a step, on four A100 with FastMoE."
    )
    for model, figures in by_model.items():
        ratio_table(report, model, figures)
    picture(report, by_model)
    report.keep(figures=by_model)
    report.write()


if __name__ == "__main__":
    main()
