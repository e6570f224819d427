"""What hiding a transfer behind the frozen GEMM is worth: the last section of dispatch.py.

Forward of one square linear with a MALoRA adapter on two processes, in its parts:

    gemm      y = W0 x
    out       S_A x, gates and row counts to the ranks of the experts
    experts   what they compute
    back      their m-wide results to the tokens' ranks
    sum       added to y

From the parts' times, the cost of the three orders in which they can run:

    nothing hidden          gemm + out + experts + back + sum
    out behind the GEMM     max(gemm, out) + experts + back + sum
    back behind the GEMM    out + experts + max(gemm, back) + sum      what layers/linear_adapters.py does

The first and the last are also run as a whole. There a transfer competes with the GEMM for the machine's cores, which a
network card would not do: the model is a bound. In backward the same transfers run the other way around.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import interleaved, print_table, ratios, summary
from models import spawn

from malora_dist.config import Config
from malora_dist.exchange.all_to_all import AllToAll
from malora_dist.kernels.columns import Columns
from malora_dist.kernels.experts import ExpertWeights, add_experts, add_rows
from malora_dist.methods.routing import route
from malora_dist.parallel import topology as layout

EP = 2
TOKENS = 1024
PARTS = ("gemm", "out", "experts", "back", "sum")


class LinearWorker:
    """One process's linear, adapter and tokens; every step of the forward pass leaves what the next one needs."""

    def __init__(self) -> None:
        self._topology = layout.initialize(Config(expert_model_parallel_size=EP, device="cpu"))

    def make(self, hidden: int) -> None:
        """Random tensors: x [T, hidden] and z of this process's tokens, weights of its experts."""
        config = Config()
        method = config.declared
        generator = torch.Generator().manual_seed(dist.get_rank())
        normal = partial(torch.randn, generator=generator)
        local = method.num_experts // EP
        self._exchange = AllToAll(method.num_experts, self._topology.ep_group, self._topology.device)
        self._x_TI, self._weight_OI = normal(TOKENS, hidden), normal(hidden, hidden)
        self._z_TD = normal(TOKENS, config.shared_dim)
        self._routing = route(normal(TOKENS, method.num_experts), config.topk, config.norm_topk_prob)
        down_ERD, up_EOR = normal(local, method.rank, config.shared_dim), normal(local, hidden, method.rank)
        self._weights = ExpertWeights(down_ERD, [up_EOR], blocks=1, scaling=method.scaling)
        self._columns = Columns(1, 0, hidden)
        for part in PARTS:
            self.run([part])

    @torch.no_grad()
    def run(self, parts: list[str]) -> float:
        """Seconds of these parts, one after the other; all processes start together."""
        dist.barrier(self._topology.ep_group)
        began = time.perf_counter()
        for part in parts:
            getattr(self, f"_{part}")()
        return time.perf_counter() - began

    def _gemm(self) -> None:
        self._y_TO = F.linear(self._x_TI, self._weight_OI)

    def _out(self) -> None:
        (self._arrived,) = self._exchange.dispatch([self._z_TD], [self._routing])

    def _experts(self) -> None:
        tokens = self._arrived.tokens
        rows = tokens.z_TD.new_zeros(tokens.z_TD.shape[0], self._columns.width)
        self._rows = add_experts("auto", rows, self._columns, tokens, self._weights)

    def _start_back(self) -> None:
        self._wait = self._exchange.send_back(self._rows, self._arrived)

    def _wait_back(self) -> None:
        self._returned, self._token_of_row = self._wait()

    def _back(self) -> None:
        self._start_back()
        self._wait_back()

    def _sum(self) -> None:
        add_rows(self._y_TO, self._returned, self._token_of_row, self._columns)


ORDERS = {
    "nothing hidden": ["out", "experts", "back", "gemm", "sum"],
    "back behind the GEMM": ["out", "experts", "start_back", "gemm", "wait_back", "sum"],
}


def modelled(parts: dict[str, float]) -> dict[str, float]:
    """Seconds of the three orders, from those of the parts."""
    gemm, out, experts, back, total = (parts[part] for part in PARTS)
    return {
        "nothing hidden": gemm + out + experts + back + total,
        "out behind the GEMM": max(gemm, out) + experts + back + total,
        "back behind the GEMM": out + experts + max(gemm, back) + total,
    }


def measure_overlap(hidden: int, rounds: int, threads: int) -> tuple[dict[str, Any], dict[str, float]]:
    """(figures, headline ratios), the tables printed."""
    with spawn(LinearWorker, EP, threads) as workers:
        workers.call("make", hidden)

        def run(parts: list[str]) -> float:
            return float(max(workers.call("run", parts)))

        steps: dict[str, Callable[[], float]] = {part: partial(run, [part]) for part in PARTS}
        steps |= {order: partial(run, parts) for order, parts in ORDERS.items()}
        seconds = interleaved(steps, rounds)
    parts = {part: summary(seconds[part])["median"] for part in PARTS}
    model = modelled(parts)
    ratio = ratios(seconds["back behind the GEMM"], seconds["nothing hidden"])
    print(f"\nforward of one linear {hidden} wide on {EP} processes, {TOKENS} tokens each")
    print_table(("part", *PARTS), [("ms", *(f"{parts[part] * 1e3:.2f}" for part in PARTS))])
    print_table(
        ("order", "modelled ms", "/ nothing hidden", "measured ms"),
        [
            (
                order,
                f"{value * 1e3:.2f}",
                f"{value / model['nothing hidden']:.2f}",
                f"{summary(seconds[order])['median'] * 1e3:.2f}" if order in seconds else "-",
            )
            for order, value in model.items()
        ],
    )
    figures = {
        "hidden": hidden,
        "tokens": TOKENS,
        "parts": {part: summary(seconds[part]) for part in PARTS},
        "modelled": model,
        "measured": {order: summary(seconds[order]) for order in ORDERS},
        "back_behind_gemm/nothing_hidden": ratio,
    }
    keys = {
        "overlap_modelled": model["back behind the GEMM"] / model["nothing hidden"],
        "overlap_measured": ratio["median"],
    }
    return figures, keys
