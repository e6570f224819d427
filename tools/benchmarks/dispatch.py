"""Bytes and time per training step of the ways in which tokens and experts meet, and where they break even.

    python tools/benchmarks/dispatch.py
    python tools/benchmarks/dispatch.py --ep 2 --hidden 1024 --tokens 256,1024,4096

A random Llama is trained on EP gloo processes of this machine, one thread each, so times hold for its loopback and its
cores; bytes hold everywhere. Every process has its own tokens (data parallel) and N / EP of the experts. At EP=1
nothing would move.

    low-rank     all_to_all as it is: S_A x travels, one row per (token, rank)
    per expert   all_to_all with one row per (token, expert): what joining a token's experts on one rank saves
    x-wide       MoLoRA through the same all_to_all, x travels: what MoLoRA and FastMoE do
    gather       gather_experts: the experts travel, once a step

Bytes are those that a rank hands to the collectives of the expert-parallel group in a step, counted by
malora_dist/metrics/traffic.py: forward and backward, its own share included. ``auto`` compares what is sent to others,
(EP - 1) / EP of it, by ``Exchange.bytes_sent``, which stands beside the counts in the same terms.
More tokens are more microbatches of one sequence each. A time is the slowest process's, median of the rounds.

The last section measures the parts of one linear at EP=2 (see overlap.py) and what hiding a transfer behind the frozen
GEMM is worth.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import headline, interleaved, print_table, ratios, summary, write_results
from models import Inputs, Processes, build_trainer, llama_config, llama_like, spawn, write_inputs
from overlap import measure_overlap
from scaling_parts import FP32, Model
from scaling_search import sent_bytes
from torch import Tensor
from torch.distributed import ProcessGroup
from transformers import LlamaConfig

from malora_dist.exchange.all_to_all import AllToAll
from malora_dist.exchange.base import Dispatched, Returning
from malora_dist.exchange.plan import cheapest_exchange
from malora_dist.families.shapes import SHAPES
from malora_dist.methods.routing import Routing
from malora_dist.methods.spec import AdapterSpec
from malora_dist.metrics.traffic import TrafficCounter
from malora_dist.parallel.device import without_expected_warnings
from malora_dist.parallel.topology import Topology

with without_expected_warnings():  # import megatron-core
    from malora_dist.layers.linear_adapters import LinearAdapters

#: {way: config keys}
WAYS = {
    "low-rank": ["method=malora", "dispatch=all_to_all"],
    "per expert": ["method=malora", "dispatch=all_to_all"],
    "x-wide": ["method=molora", "dispatch=all_to_all"],
    "gather": ["method=malora", "dispatch=gather_experts"],
}


class RowPerExpert(AllToAll):
    """Sends every token k times, each time with one of its experts."""

    def __init__(self, num_experts: int, group: ProcessGroup, device: torch.device, topk: int) -> None:
        super().__init__(num_experts, group, device)
        self._topk = topk

    def dispatch(self, z: Sequence[Tensor], routings: Sequence[Routing]) -> list[Dispatched]:
        single = [
            r._replace(gates_TK=r.gates_TK.reshape(-1, 1), experts_TK=r.experts_TK.reshape(-1, 1)) for r in routings
        ]
        return super().dispatch([z_TD.repeat_interleave(self._topk, dim=0) for z_TD in z], single)

    def send_back(self, rows: Tensor, dispatched: Dispatched) -> Returning:
        wait = super().send_back(rows, dispatched)

        def rows_of_tokens() -> tuple[Tensor, Tensor]:
            returned, slot_of_row = wait()
            return returned, slot_of_row // self._topk

        return rows_of_tokens


class Worker:
    """One process's trainers, by name."""

    def __init__(self) -> None:
        self._topology: Topology | None = None
        self._trainers: dict[str, Any] = {}

    def build(self, way: str, overrides: Sequence[str]) -> None:
        """Make the trainer of a way; all trainers of one process share a layout."""
        trainer: Any = build_trainer(overrides, self._topology)
        if way == "per expert":
            config, topology = trainer.config, trainer.topology
            exchange = RowPerExpert(config.num_experts, topology.ep_group, topology.device, config.topk)
            for module in trainer.trained.model[0].modules():
                if isinstance(module, LinearAdapters):
                    module._exchange = exchange
        self._topology, self._trainers[way] = trainer.topology, trainer

    def forget(self) -> None:
        """Drop all trainers."""
        self._trainers.clear()
        gc.collect()

    def step(self, way: str, sequences: int) -> float:
        """Seconds of a step on so many sequences of this process's own."""
        trainer = self._trainers[way]
        trainer.config.global_batch_size = sequences * trainer.topology.dp_size
        torch.distributed.barrier()
        began = time.perf_counter()
        trainer.train_step()
        return time.perf_counter() - began

    def bytes_of_step(self, way: str, sequences: int) -> int:
        """Bytes of a step's collectives over the expert-parallel group."""
        with TrafficCounter(self._trainers[way].topology) as counter:
            self.step(way, sequences)
        return counter.bytes["ep"]


def measure(inputs: Inputs, ep: int, args: argparse.Namespace) -> dict[int, Any]:
    """{N: {tokens: {way: figures}}} on ``ep`` processes."""
    figures: dict[int, Any] = {}
    with spawn(Worker, ep, args.threads) as workers:
        for n in args.experts:
            keys = [f"num_lora_experts={n}", f"expert_model_parallel_size={ep}", "device=cpu"]
            for way, own in WAYS.items():
                workers.call("build", way, inputs.overrides(*own, *keys, global_batch_size=ep))
            figures[n] = {
                tokens: measure_step(workers, tokens // args.seq_length, args.rounds) for tokens in args.tokens
            }
            workers.call("forget")
    return figures


def measure_step(workers: Processes, sequences: int, rounds: int) -> dict[str, Any]:
    """{way: bytes of the average process, seconds of the slowest, and these relative to low-rank}."""
    nbytes = {way: statistics.mean(workers.call("bytes_of_step", way, sequences)) for way in WAYS}
    runs = {way: partial(_slowest, workers, way, sequences) for way in WAYS}
    seconds = interleaved(runs, rounds, warmup=0)  # the counted steps were the warm-up
    return {
        way: {
            "bytes": nbytes[way],
            "seconds": summary(seconds[way]),
            "to_low_rank": ratios(seconds[way], seconds["low-rank"]),
        }
        for way in WAYS
    }


def _slowest(workers: Processes, way: str, sequences: int) -> float:
    return float(max(workers.call("step", way, sequences)))


@dataclass(frozen=True)
class Rule:
    """What ``Exchange.bytes_sent`` says of one rank's step of a whole Llama, MALoRA with N experts.

    Attributes:
        all_to_all: bytes per token, in the counter's terms.
        gather: bytes, in the counter's terms.
        fits: {linear: whether the copies of its experts are small enough for ``auto``}.
    """

    all_to_all: float
    gather: float
    fits: dict[str, bool]

    @classmethod
    def of(cls, hf: LlamaConfig, n: int, ep: int) -> Rule:
        """For N experts on ``ep`` ranks."""
        spec, model = AdapterSpec(num_lora_experts=n), Model.of(hf)
        counted = ep / (ep - 1)  # the counter includes a rank's own share
        all_to_all, gather = (
            counted * sent_bytes(model, spec, way, ep, 1, FP32) for way in ("all_to_all", "gather_experts")
        )
        many = 10**12  # tokens, so that bytes do not stand in the way
        fits = {}
        for linear in model.adapted(spec):
            largest = max(linear.sites(spec, 1, ep, many, FP32), key=lambda site: site.out_features)
            fits[linear.name] = cheapest_exchange(largest) == "gather_experts"
        return cls(all_to_all, gather, fits)

    def describe(self) -> str:
        """From how many tokens on ``auto`` takes gather_experts."""
        refused = [linear.removeprefix("linear_") for linear, fits in self.fits.items() if not fits]
        tokens = f"{self.gather / self.all_to_all:.0f}"
        if not refused:
            return tokens
        return "never: too large" if len(refused) == len(self.fits) else f"{tokens}, never {','.join(refused)}"


def crossover_in_time(of_tokens: Mapping[int, Any]) -> str:
    """Tokens from which on gather is no slower than low-rank, interpolated; ``<`` or ``>``: beyond those measured."""
    points = [
        (tokens, ways["gather"]["seconds"]["median"] - ways["low-rank"]["seconds"]["median"])
        for tokens, ways in of_tokens.items()
    ]
    if points[0][1] <= 0:
        return f"<{points[0][0]}"
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if y1 <= 0:
            return f"{x0 + (x1 - x0) * y0 / (y0 - y1):.0f}"
    return f">{points[-1][0]}"


def print_steps(figures: Mapping[int, Any], hf: LlamaConfig) -> None:
    """Bytes and time of every way, one row for N, EP and the number of tokens."""
    rows = []
    for ep, of_n in figures.items():
        for n, of_tokens in of_n.items():
            rule = Rule.of(hf, n, ep)
            for tokens, ways in of_tokens.items():
                megabytes = [f"{ways[way]['bytes'] / 1e6:.2f}" for way in WAYS]
                formulas = [f"{rule.all_to_all * tokens / 1e6:.2f}", f"{rule.gather / 1e6:.2f}"]
                times = [f"{ways[way]['seconds']['median'] * 1e3:.0f}" for way in WAYS]
                rows.append((f"N={n}", ep, tokens, *megabytes, *formulas, *times))
    names = (*WAYS, "low-rank by formula", "gather by formula")
    print_table(("", "EP", "tokens", *(f"{name} MB" for name in names), *(f"{way} ms" for way in WAYS)), rows)


def print_crossovers(figures: Mapping[int, Any], hf: LlamaConfig) -> dict[str, str]:
    """Where gather and low-rank break even, measured and by the rule of ``auto``; headline pairs."""
    rows: list[tuple[object, ...]] = []
    keys: dict[str, str] = {}
    for ep, of_n in figures.items():
        for n, of_tokens in of_n.items():
            tokens, ways = list(of_tokens.items())[-1]
            in_bytes = f"{tokens * ways['gather']['bytes'] / ways['low-rank']['bytes']:.0f}"
            rule = Rule.of(hf, n, ep)
            in_time = crossover_in_time(of_tokens)
            rows.append((f"N={n}", ep, in_bytes, f"{rule.gather / rule.all_to_all:.0f}", in_time, rule.describe()))
            keys |= {f"equal_bytes@N{n}_EP{ep}": in_bytes, f"equal_time@N{n}_EP{ep}": in_time}
    print("\ntokens per rank and step from which on gather_experts costs no more than low-rank all_to_all")
    print_table(("", "EP", "equal bytes", "by formula", "equal time", "auto takes gather_experts from"), rows)
    return keys


def print_rule_at_scale(experts: Sequence[int]) -> None:
    """The same rule at a released model's widths, where it is arithmetic."""
    hf = llama_config(**SHAPES["llama3-8b"] | {"layers": 1})
    print("\nthe rule at Llama-3-8B's widths, float32: tokens per rank and step")
    ranks = (2, 8, 64)
    rows = [(f"N={n}", *("-" if n % ep else Rule.of(hf, n, ep).describe() for ep in ranks)) for n in experts]
    print_table(("", *(f"EP={ep}" for ep in ranks)), rows)


def headline_ratios(figures: Mapping[int, Any]) -> dict[str, float]:
    """Of the largest EP, its first N and most tokens."""
    ep = max(figures)
    n, of_tokens = next(iter(figures[ep].items()))
    ways = list(of_tokens.values())[-1]
    keys: dict[str, float] = {}
    for way in ("x-wide", "per expert", "gather"):
        name = f"{way.replace(' ', '_')}/low-rank"
        keys[f"bytes_{name}@N{n}_EP{ep}"] = ways[way]["bytes"] / ways["low-rank"]["bytes"]
        keys[f"time_{name}@N{n}_EP{ep}"] = ways[way]["to_low_rank"]["median"]
    return keys


def numbers(text: str) -> list[int]:
    """Of a comma-separated list."""
    return [int(part) for part in text.split(",")]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256, help="of the Llama (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--experts", type=numbers, default=[8, 64, 512], help="N (default: 8,64,512)")
    parser.add_argument("--ep", type=numbers, default=[2, 4, 8], help="processes (default: 2,4,8)")
    parser.add_argument("--tokens", type=numbers, default=[128, 512], help="of a rank's step (default: 128,512)")
    parser.add_argument("--seq-length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3, help="steps of every way after one of warm-up")
    parser.add_argument("--threads", type=int, default=1, help="of torch in each process")
    parser.add_argument("--overlap-hidden", type=int, default=2048, help="width of the last section's linear")
    parser.add_argument("--output", type=Path, help="another JSON file to write")
    args = parser.parse_args()
    if min(args.ep) < 2:
        parser.error("--ep must be 2 or more: one process has all experts and moves nothing")
    if any(tokens % args.seq_length for tokens in args.tokens):
        parser.error(f"--tokens must be multiples of --seq-length {args.seq_length}")
    return args


def main() -> None:
    """Measure, print and write down."""
    args = parse()
    hf = llama_like(args.hidden, args.layers)
    print(f"hidden {hf.hidden_size}, ffn {hf.intermediate_size}, layers {args.layers}, float32, per rank and step")
    with tempfile.TemporaryDirectory(prefix="malora-dispatch-") as scratch:
        inputs = write_inputs(Path(scratch), hf, args.seq_length)
        figures = {ep: measure(inputs, ep, args) for ep in args.ep}
    print_steps(figures, hf)
    keys: dict[str, Any] = headline_ratios(figures) | print_crossovers(figures, hf)
    print_rule_at_scale(args.experts)
    overlap, found = measure_overlap(args.overlap_hidden, args.rounds, args.threads)
    settings = {"hidden_size": args.hidden, "layers": args.layers, "seq_length": args.seq_length}
    write_results(__file__, settings | {"steps": figures, "overlap": overlap}, "megatron-core", output=args.output)
    headline(**keys, **found)


if __name__ == "__main__":
    main()
