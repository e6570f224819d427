"""Step time of MALoRA over the number of experts: step_time.py --experts."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from common import print_table, ratios, spread, summary
from settings import Setting
from steps import Bench, Run

FORMS = ("gated_block", "grouped")


def compare_experts(bench: Bench, setting: Setting, args: argparse.Namespace) -> dict[str, Any]:
    """{"form" or "form fused": {N: figures}}; ``auto`` repeats the figures of the form that its rule takes."""
    first = args.experts[0]
    figures: dict[str, Any] = {}
    for fused in (False, True):
        common = [*setting.overrides("malora"), f"fuse_projections={str(fused).lower()}", *args.keys]

        def run(form: str, n: int, common: list[str] = common) -> Run:
            return Run([*common, f"num_lora_experts={n}", f"expert_compute={form}"])

        runs = {f"{form} {n}": run(form, n) for form in args.compute for n in args.experts}
        seconds = bench.step_seconds(runs, args.rounds)
        for row in (*args.compute, *(("auto",) if len(args.compute) == len(FORMS) else ())):
            of_n = {}
            for n in args.experts:
                name, least = (f"{bench.form(run(row, m))} {m}" for m in (n, first))
                of_n[n] = {
                    "form": name.split()[0],
                    "trainable_parameters": bench.trained_numbers(runs[name]),
                    "seconds": summary(seconds[name].step),
                    "optimizer_seconds": summary(seconds[name].optimizer),
                    "ratio": ratios(seconds[name].step, seconds[least].step),
                    "ratio_without_optimizer": ratios(
                        seconds[name].without_optimizer, seconds[least].without_optimizer
                    ),
                    "floor": bench.operations(runs[name]) / bench.operations(runs[least]),
                }
            figures[f"{row} fused" if fused else row] = of_n
    return figures


def print_experts(figures: Mapping[str, Any]) -> dict[str, float]:
    """The table over N, and its headline ratios: the last N to the first."""
    rows = [
        (
            row,
            n,
            f["form"],
            f"{f['trainable_parameters'] / 1e6:.2f}",
            f"{f['seconds']['median'] * 1e3:.0f}",
            f"{f['optimizer_seconds']['median'] * 1e3:.0f}",
            spread(f["ratio"]),
            f"{f['ratio_without_optimizer']['median']:.3f}",
            f"{f['floor']:.3f}",
        )
        for row, of_n in figures.items()
        for n, f in of_n.items()
    ]
    first, *_, last = next(iter(figures.values()))
    ratio = f"/ N={first} [quartiles]"
    header = ("expert_compute", "N", "form", "M params", "ms", "optimizer ms", ratio, "without optimizer", "floor")
    print_table(header, rows)
    keys: dict[str, float] = {}
    for row, of_n in figures.items():
        name = row.replace(" ", "_")
        keys |= {
            f"{name}_{last}/{first}": of_n[last]["ratio"]["median"],
            f"{name}_without_optimizer": of_n[last]["ratio_without_optimizer"]["median"],
        }
    return keys
