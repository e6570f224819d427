"""What looks wrong in a run's figures, each with its cure; :class:`Watch` follows them from report to report.

A fault has to last before it is told, so that one odd batch does not count, and is told once until it has passed.

Shape suffixes: see methods/base.py; J tasks.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from malora_dist.config import Config
from malora_dist.errors import first_few
from malora_dist.methods.routing import STARVED_LOAD, effective_share
from malora_dist.metrics.loggers.base import Metrics
from malora_dist.metrics.routing import RoutingReport

#: Reports in a row. Starting routers wander, so a starved expert gets more time.
STARVED_REPORTS = 10
ROUTING_REPORTS = 5
DATA_REPORTS = 3
STRAGGLER_REPORTS = 5
#: An expert takes most tokens above this share of them.
MOST_TOKENS = 0.9
#: A router has collapsed where it uses the topk experts that it must and less than this part of the others.
COLLAPSED = 0.05
#: Share of the sites that have collapsed.
COLLAPSED_SITES = 0.5
#: Top-k slots per expert below which a report says nothing about its load.
FEWEST_SLOTS = 20
DATA_WAIT = 0.2
STRAGGLER = 1.3
#: Evaluations in a row in which a task's validation loss is above its best by this part of it, and by so much.
RISING_EVALUATIONS = 2
RISEN = 0.05
RISEN_AT_LEAST = 0.02
#: So many experts or tasks are named in a warning.
_SHOWN = 2

#: Tags of others that are watched.
SHARE_TAG = "time share/"
COMPUTE_TAG = "compute seconds by rank"
POSITIONS_TAG = "positions by rank"


class _Lasting:
    """Counts how often in a row something holds; true once when it has held long enough, until it has passed."""

    def __init__(self, reports: int) -> None:
        self._reports, self._in_a_row = reports, 0

    def see(self, holds: bool) -> bool:
        self._in_a_row = self._in_a_row + 1 if holds else 0
        return self._in_a_row == self._reports


class Watch:
    """Warns. It remembers this start of a run only: what lasted before a restart has to last anew.

    Args:
        stages: the pipeline stage of each rank; the work of ranks of one stage is alike.
    """

    def __init__(self, config: Config, stages: Sequence[int]) -> None:
        self._config = config
        self._stages = list(stages)
        self._starved: dict[str, Tensor] = {}  # {site: reports in a row [N]}
        self._told_starved = 0
        self._dominant: dict[str, _Lasting] = {}
        self._collapse, self._data = _Lasting(ROUTING_REPORTS), _Lasting(DATA_REPORTS)
        self._stragglers = [_Lasting(STRAGGLER_REPORTS) for _ in self._stages]
        self._seesaw = _Seesaw(config)

    def report(self, routing: RoutingReport, metrics: Metrics) -> list[str]:
        """Warnings of a report's figures."""
        self._seesaw.trained(metrics.scalars)
        return [*self._of_routing(routing), *self._of_time(metrics)]

    def evaluation(self, scalars: Mapping[str, float], step: int) -> list[str]:
        """Warnings of an evaluation's figures."""
        return self._seesaw.evaluated(scalars, step)

    # ---- experts

    def _of_routing(self, routing: RoutingReport) -> Iterator[str]:
        loads = {site: counts_JN.sum(dim=0) for site, counts_JN in routing.counts_JN.items()}
        loads = {site: load_N for site, load_N in loads.items() if load_N.mean() >= FEWEST_SLOTS}
        if not loads:
            return
        n, k = self._config.num_experts, self._config.topk
        used = [n * effective_share(load_N) for load_N in loads.values()]
        collapsed = sum(experts < k + COLLAPSED * (n - k) for experts in used)
        has_collapsed = collapsed > COLLAPSED_SITES * len(loads)
        if self._collapse.see(k < n and has_collapsed):
            yield (
                f"the router has collapsed: at {collapsed} of {len(loads)} adapted projections nearly all tokens go to "
                f"the same {k} of {n} experts; raise aux_loss_coeff={self._config.aux_loss_coeff:g}, or lower "
                f"lr={self._config.lr:g} and begin again"
            )
        yield from self._dominating(loads, tell=not has_collapsed)
        yield from self._starving(loads)

    def _dominating(self, loads: Mapping[str, Tensor], tell: bool) -> Iterator[str]:
        if 2 * self._config.topk > self._config.num_experts:
            return  # most tokens go to every expert anyway
        found = []
        for site, load_N in loads.items():
            share = float(load_N.max()) * self._config.topk / float(load_N.sum())
            if self._dominant.setdefault(site, _Lasting(ROUTING_REPORTS)).see(share > MOST_TOKENS):
                found.append(f"expert {int(load_N.argmax())} of {site} takes {share:.0%} of the tokens")
        if found and tell:
            yield f"{first_few(found, _SHOWN)}; raise aux_loss_coeff={self._config.aux_loss_coeff:g}"

    def _starving(self, loads: Mapping[str, Tensor]) -> Iterator[str]:
        starved = []
        for site, load_N in loads.items():
            before_N = self._starved.get(site, torch.zeros_like(load_N))
            self._starved[site] = now_N = (before_N + 1) * (load_N < STARVED_LOAD * load_N.mean())
            starved += [f"expert {e} of {site}" for e in (now_N >= STARVED_REPORTS).nonzero().flatten().tolist()]
        worse = len(starved) >= max(2 * self._told_starved, 1)
        self._told_starved = len(starved) if worse else min(self._told_starved, len(starved))
        if worse:
            experts = len(loads) * self._config.num_experts
            yield (
                f"{len(starved)} of {experts} experts have had less than {STARVED_LOAD:.0%} of an even load in "
                f"{STARVED_REPORTS} reports in a row and hardly train ({first_few(starved, _SHOWN)}); raise "
                f"aux_loss_coeff={self._config.aux_loss_coeff:g}, or lower num_lora_experts={self._config.num_experts}"
            )

    # ---- time

    def _of_time(self, metrics: Metrics) -> Iterator[str]:
        outside = sum(metrics.scalars.get(f"{SHARE_TAG}{name}", 0.0) for name in ("evaluation", "saving", "rest"))
        share = metrics.scalars.get(f"{SHARE_TAG}data", 0.0) / max(1 - outside, 1e-9)
        if self._data.see(share > DATA_WAIT):
            yield (
                f"{share:.0%} of a step is spent waiting for its batch; put the data on a faster disk, or give every "
                "process a CPU core of its own"
            )
        yield from self._straggling(metrics.counts.get(COMPUTE_TAG, []), metrics.counts.get(POSITIONS_TAG, []))

    def _straggling(self, seconds: Sequence[float], positions: Sequence[float]) -> Iterator[str]:
        """Of the seconds for as much work: a rank with longer samples is not slow."""
        pace = [s / max(work, 1.0) for s, work in zip(seconds, positions, strict=True)]
        for rank, own in enumerate(pace):
            usual = statistics.median_low(
                [p for p, stage in zip(pace, self._stages, strict=True) if stage == self._stages[rank]]
            )
            if self._stragglers[rank].see(own > STRAGGLER * usual):
                yield (
                    f"rank {rank} computes {own / usual:.1f} times as long as is usual for as many tokens "
                    f"({seconds[rank]:.3g} s in this step), and all wait for it; look for another program on its "
                    "machine, heat or a slower device"
                )


class _Seesaw:
    """A task whose validation loss has risen from its best."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._reports: dict[str, list[float]] = {}  # {task: its training losses since the last evaluation}
        self._training: dict[str, float] = {}  # {task: their mean before the last evaluation}
        self._best: dict[str, tuple[float, int, float]] = {}  # {task: (validation loss, step, training loss then)}
        self._rising: dict[str, _Lasting] = {}

    def trained(self, scalars: Mapping[str, float]) -> None:
        for task, loss in _of_tasks(scalars, "lm loss/").items():
            self._reports.setdefault(task, []).append(loss)

    def evaluated(self, scalars: Mapping[str, float], step: int) -> list[str]:
        self._training |= {task: statistics.fmean(losses) for task, losses in self._reports.items()}
        self._reports.clear()
        losses, risen, at_best = _of_tasks(scalars, "lm loss validation/"), [], []
        for task, loss in losses.items():
            best, _, _ = self._best.get(task, (math.inf, 0, 0.0))
            if loss < best:
                self._best[task] = (loss, step, self._training.get(task, math.inf))
                at_best.append(task)
            has_risen = loss > best + max(RISEN * best, RISEN_AT_LEAST)
            if self._rising.setdefault(task, _Lasting(RISING_EVALUATIONS)).see(has_risen):
                risen.append(task)
        return [self._text(task, losses[task], at_best) for task in risen]

    def _text(self, task: str, loss: float, at_best: Sequence[str]) -> str:
        best, step, training = self._best[task]
        what = f"validation loss of {task} has risen from {best:.3g} at iteration {step} to {loss:.3g}"
        if self._training.get(task, math.inf) < training:
            return (
                f"{what} while its training loss falls: it is learnt by heart; end sooner (early_stopping_patience), "
                f"lower lr={self._config.lr:g}, or lower its weight"
            )
        if at_best:
            return (
                f"{what} while {first_few(at_best, _SHOWN)} gained, a seesaw: tasks compete; raise its weight, lower "
                f"lr={self._config.lr:g}, or give them room (num_lora_experts, lora_rank)"
            )
        return f"{what}, and no task gained: training diverges; lower lr={self._config.lr:g}"


def _of_tasks(scalars: Mapping[str, float], prefix: str) -> dict[str, float]:
    return {tag.removeprefix(prefix): value for tag, value in scalars.items() if tag.startswith(prefix)}
