"""Where the two forms of computing one adapter's experts cost the same: the last section of step_time.py."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from common import interleaved, now, print_table, ratios, summary
from torch import Tensor

from malora_dist.kernels.columns import Columns
from malora_dist.kernels.experts import ExpertWeights, Tokens, add_experts, choose_expert_compute

#: (topk, rank of an expert) pairs that the crossover over N is looked for at.
ROUTINGS = ((1, 12), (2, 12), (4, 12), (2, 48))
SHARED_DIM = 32
LARGEST_BLOCK = 1600  # inner values N * r of the largest gated block


def make_step(
    form: str,
    num_experts: int,
    topk: int,
    rank: int,
    hidden: int,
    tokens: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Callable[[], float]:
    """A function that runs one adapter's experts forward and backward on a square linear, and answers the seconds."""
    generator = torch.Generator(device).manual_seed(0)
    normal = partial(torch.randn, generator=generator, device=device)
    z_TD = normal(tokens, SHARED_DIM, dtype=dtype).requires_grad_()
    gates_TK, experts_TK = (t.detach() for t in normal(tokens, num_experts).softmax(dim=-1).topk(topk))
    gates_TK.requires_grad_()
    down_ERD = normal(num_experts, rank, SHARED_DIM).requires_grad_()
    up_EOR = normal(num_experts, hidden, rank).requires_grad_()
    dy_TO = normal(tokens, hidden, dtype=dtype)
    inputs: Sequence[Tensor] = (z_TD, gates_TK, down_ERD, up_EOR)
    weights = ExpertWeights(down_ERD, [up_EOR], blocks=1, scaling=2.0)

    def step() -> float:
        y_TO = torch.zeros_like(dy_TO)  # stands for the base linear's output
        began = now(device)
        y_TO = add_experts(form, y_TO, Columns(1, 0, hidden), Tokens(z_TD, gates_TK, experts_TK), weights)
        torch.autograd.grad(y_TO, inputs, dy_TO)
        return now(device) - began

    return step


def crossover(blocks: Sequence[int], grouped_to_gated: Sequence[float]) -> float | None:
    """The N * r at which the ratio falls through 1, interpolated on logarithmic axes; None: nowhere in this range."""
    for (x0, y0), (x1, y1) in itertools.pairwise(zip(blocks, grouped_to_gated, strict=True)):
        if y0 > 1 >= y1:
            return x0 * (x1 / x0) ** (math.log(y0) / math.log(y0 / y1))
    return None


def ruled_crossover(topk: int, rank: int, device: torch.device) -> int:
    """The largest N * r that ``expert_compute: auto`` still computes as a gated block."""
    experts = topk
    while choose_expert_compute(experts + 1, topk, rank, device.type) == "gated_block":
        experts += 1
    return experts * rank


def measure_forms(
    hidden: int, tokens: int, rounds: int, device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, Any], dict[str, str]]:
    """({setting: figures}, headline ratios) of the experts of one square linear, its table printed."""
    print(f"\none square linear, hidden {hidden}, {tokens} tokens: experts alone, forward and backward")
    figures: dict[str, Any] = {}
    keys: dict[str, str] = {}
    rows: list[tuple[object, ...]] = []
    for topk, rank in ROUTINGS:
        over_n = {}
        n = max(2, topk)
        while n * rank <= LARGEST_BLOCK:
            steps = {
                form: make_step(form, n, topk, rank, hidden, tokens, device, dtype)
                for form in ("gated_block", "grouped")
            }
            seconds = interleaved(steps, rounds)
            ratio = ratios(seconds["grouped"], seconds["gated_block"])
            over_n[n] = {form: summary(values) for form, values in seconds.items()} | {"grouped/gated_block": ratio}
            chosen = choose_expert_compute(n, topk, rank, device.type)
            ms = (f"{summary(seconds[form])['median'] * 1e3:.2f}" for form in ("gated_block", "grouped"))
            quartiles = f"{ratio['median']:.2f} [{ratio['q1']:.2f} {ratio['q3']:.2f}]"
            rows.append((f"k={topk} r={rank}", n, n * rank, *ms, quartiles, chosen))
            n *= 2
        measured = crossover([n * rank for n in over_n], [f["grouped/gated_block"]["median"] for f in over_n.values()])
        rule = ruled_crossover(topk, rank, device)
        name = f"k{topk}_r{rank}"
        slot_cost = None if measured is None else measured / topk - rank
        figures[name] = {"over_n": over_n, "crossover": measured, "rule": rule, "slot_cost": slot_cost}
        keys |= {f"crossover_{name}": "none" if measured is None else f"{measured:.0f}", f"rule_{name}": str(rule)}
    header = ("setting", "N", "N r", "gated block ms", "grouped ms", "grouped / gated block", "auto takes")
    print_table(header, rows)
    for name, f in figures.items():
        found = "no crossover in this range" if f["crossover"] is None else f"equal at N r = {f['crossover']:.0f}"
        cost = "" if f["slot_cost"] is None else f"; a moved row costs as much as {f['slot_cost']:.0f} inner values"
        print(f"{name}: {found}, the rule changes over at {f['rule']}{cost}")
    return figures, keys
