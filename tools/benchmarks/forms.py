"""Where the two forms of computing one adapter's experts cost the same: the last section of step_time.py."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from common import interleaved, print_table, ratios, summary
from torch import Tensor

from malora_dist.kernels.experts import Columns, add_experts, choose_expert_compute

#: (topk, rank of an expert) pairs that the crossover over N is looked for at.
SETTINGS = ((1, 10), (2, 10), (4, 10), (2, 40))
SHARED_DIM = 10
LARGEST_BLOCK = 1300  # inner values N * r' of the largest gated block


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
    z_TZ = normal(tokens, SHARED_DIM, dtype=dtype).requires_grad_()
    logits_TN = normal(tokens, num_experts)
    gates_TK, experts_TK = (t.detach() for t in logits_TN.softmax(dim=-1).topk(topk))
    gates_TK.requires_grad_()
    down_ERZ = normal(num_experts, rank, SHARED_DIM).requires_grad_()
    up_EMR = normal(num_experts, hidden, rank).requires_grad_()
    dy_TM = normal(tokens, hidden, dtype=dtype)
    inputs: Sequence[Tensor] = (z_TZ, gates_TK, down_ERZ, up_EMR)

    def step() -> float:
        y_TM = torch.zeros_like(dy_TM)  # stands for the base linear's output
        began = now(device)
        y_TM = add_experts(form, y_TM, z_TZ, gates_TK, experts_TK, down_ERZ, [up_EMR], 2.0, Columns(1, 0, hidden))
        torch.autograd.grad(y_TM, inputs, dy_TM)
        return now(device) - began

    return step


def now(device: torch.device) -> float:
    """Seconds of a clock, when all that was started on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def crossover(blocks: Sequence[int], grouped_to_gated: Sequence[float]) -> float | None:
    """The N * r' at which the ratio falls through 1, interpolated on logarithmic axes; None: nowhere in this range."""
    for (x0, y0), (x1, y1) in itertools.pairwise(zip(blocks, grouped_to_gated, strict=True)):
        if y0 > 1 >= y1:
            return x0 * (x1 / x0) ** (math.log(y0) / math.log(y0 / y1))
    return None


def ruled_crossover(topk: int, rank: int, device: torch.device) -> int:
    """The largest N * r' that ``expert_compute: auto`` still computes as a gated block."""
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
    for topk, rank in SETTINGS:
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
            rows.append((f"k={topk} r'={rank}", n, n * rank, *ms, quartiles, chosen))
            n *= 2
        measured = crossover([n * rank for n in over_n], [f["grouped/gated_block"]["median"] for f in over_n.values()])
        rule = ruled_crossover(topk, rank, device)
        name = f"k{topk}_r{rank}"
        slot_cost = None if measured is None else measured / topk - rank
        figures[name] = {"over_n": over_n, "crossover": measured, "rule": rule, "slot_cost": slot_cost}
        keys |= {f"crossover_{name}": "none" if measured is None else f"{measured:.0f}", f"rule_{name}": str(rule)}
    header = ("setting", "N", "N r'", "gated block ms", "grouped ms", "grouped / gated block", "auto takes")
    print_table(header, rows)
    for name, f in figures.items():
        found = "no crossover in this range" if f["crossover"] is None else f"equal at N r' = {f['crossover']:.0f}"
        cost = "" if f["slot_cost"] is None else f"; a moved row costs as much as {f['slot_cost']:.0f} inner values"
        print(f"{name}: {found}, the rule changes over at {f['rule']}{cost}")
    return figures, keys
