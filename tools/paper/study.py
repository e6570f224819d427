"""What every script of this folder does: its options, the domains and sweeps of a scale, tuned learning rates."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from experiment import Cell, Domain, Run
from scales import DOMAINS, SCALES, Scale, make_domain
from sweep import Result, Workers, adapter_file

from malora_dist.files import path_argument

ROOT = Path(__file__).resolve().parents[2]


class Tuned(NamedTuple):
    """A cell's learning rate and how it was found.

    Attributes:
        losses: {learning rate: mean validation answer loss over tasks and tuning seeds}; NaN: it diverged.
    """

    lr: float
    losses: dict[float, float]

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the grid's first or last, so that a better one may lie outside."""
        return len(self.losses) > 2 and self.lr in (min(self.losses), max(self.losses))


class Study:
    """A script's scale and where its files are."""

    def __init__(self, args: argparse.Namespace, title: str) -> None:
        scale = SCALES[args.scale]
        if args.steps:
            scale = scale.with_steps(args.steps)
        if args.seeds:
            scale = replace(scale, seeds=scale.seeds[: args.seeds], tuning_seeds=scale.tuning_seeds[: args.seeds])
        self.out = args.out / (f"{scale.name}_{args.steps}_steps" if args.steps else scale.name)
        self.scale: Scale = scale
        self.title = title
        self._args = args
        self._domains: dict[str, Domain] = {}
        self._workers = Workers(args.jobs, max(1, (os.cpu_count() or 1) // max(1, args.jobs)))

    @property
    def _runs(self) -> Path:
        return self.out / "runs"

    def __enter__(self) -> Study:
        return self

    def __exit__(self, *_: object) -> None:
        self._workers.close()

    def domain(self, name: str) -> Domain:
        """Its base and files, made unless they are there."""
        if name not in self._domains:
            self._domains[name] = make_domain(self.scale, name, self.out, self._args.hf_model, self._args.data)
        return self._domains[name]

    def make(self, runs: Sequence[Run], what: str) -> list[Result]:
        """The results of runs, in their order."""
        return self._workers.run_all(runs, self._runs, f"{self.title}: {what}")

    def adapter_file(self, run: Run) -> Path:
        """Where a run that keeps its adapter wrote it."""
        return adapter_file(self._runs / f"{run.identity}.json")

    def tune(self, domain: Domain, cells: Sequence[Cell]) -> dict[str, Tuned]:
        """Every cell's best learning rate of the scale's grid, by the validation splits; the cost is alike for all."""
        return self.tune_all([(domain, cell) for cell in cells], [cell.name for cell in cells])

    def tune_all(self, pairs: Sequence[tuple[Domain, Cell]], names: Sequence[str]) -> dict[str, Tuned]:
        """The same for cells on domains of their own, which have to be named apart."""
        points = [(lr, seed) for seed in self.scale.tuning_seeds for lr in self.scale.lrs]
        runs = [Run(domain, cell, lr, seed, is_tried=True) for lr, seed in points for domain, cell in pairs]
        results = self.make(runs, "learning rates")
        return {name: choose(results[i :: len(pairs)]) for i, name in enumerate(names)}

    def train(
        self, domain: Domain, cells: Sequence[Cell], tuned: Mapping[str, Tuned], keeps_adapter: bool = False
    ) -> dict[str, list[Result]]:
        """{cell: a result per seed} at the tuned learning rates."""
        return self.train_all([(domain, cell) for cell in cells], [c.name for c in cells], tuned, keeps_adapter)

    def train_all(
        self,
        pairs: Sequence[tuple[Domain, Cell]],
        names: Sequence[str],
        tuned: Mapping[str, Tuned],
        keeps_adapter: bool = False,
    ) -> dict[str, list[Result]]:
        """The same for cells on domains of their own; seed by seed, so that a part of a sweep is whole comparisons."""
        runs = [
            Run(domain, cell, tuned[name].lr, seed, keeps_adapter)
            for seed in self.scale.seeds
            for name, (domain, cell) in zip(names, pairs, strict=True)
        ]
        results = self.make(runs, "seeds")
        return {name: results[i :: len(pairs)] for i, name in enumerate(names)}


def choose(results: Sequence[Result]) -> Tuned:
    """The learning rate with the lowest validation loss, averaged over tasks and seeds."""
    losses = {
        lr: mean(mean(result["validation"].values()) for result in results if result["lr"] == lr)
        for lr in sorted({result["lr"] for result in results})
    }
    finite = {lr: loss for lr, loss in losses.items() if math.isfinite(loss)}
    best = min(finite, key=finite.__getitem__) if finite else min(losses)
    return Tuned(best, losses)


def build_parser(description: str) -> argparse.ArgumentParser:
    """The options of every script."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="tiny", help="default: %(default)s")
    parser.add_argument("--hf-model", type=path_argument, metavar="DIR", help="base of the scales small and gpu")
    parser.add_argument("--data", type=path_argument, metavar="DIR", help="folder of the data sets of the scale small")
    parser.add_argument("--out", type=path_argument, default="runs/paper", metavar="DIR", help="default: %(default)s")
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs side by side, the cores divided among them; 0: in this process"
    )
    parser.add_argument("--seeds", type=int, help="only so many")
    parser.add_argument("--steps", type=int, help="train so long; at --scale tiny all else shrinks, to try a script")
    return parser


def settings(study: Study) -> dict[str, Any]:
    """What a result file says of its scale."""
    scale = study.scale
    return {"scale": scale.name, "seeds": scale.seeds, "tuning_seeds": scale.tuning_seeds, "lrs": scale.lrs} | {
        "keys": dict(scale.keys)
    }


__all__ = ["DOMAINS", "ROOT", "Study", "Tuned", "build_parser", "choose", "settings"]
