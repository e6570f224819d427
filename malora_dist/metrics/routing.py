"""What the experts do, from the routing statistics of all ranks: balance, and how far routing separates the tasks.

Shape suffixes: see methods/base.py; J tasks.
"""

from __future__ import annotations

import statistics as stats
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from malora_dist.config import Config
from malora_dist.layers.routing_context import RoutingContext, SiteStatistics
from malora_dist.methods.routing import effective_share, max_over_mean, mutual_information, variation
from malora_dist.metrics.loggers.base import Metrics, Table
from malora_dist.parallel.topology import Topology

#: {tag: quantile over all sites} of the busiest expert's load over the mean load.
BALANCE_QUANTILES = {"malora/balance/median": 0.5, "malora/balance/p90": 0.9, "malora/balance/max": 1.0}


def reduce_statistics(context: RoutingContext, topology: Topology) -> dict[str, SiteStatistics]:
    """Sum the recorded statistics over data- and tensor-parallel ranks, collect them over stages.

    Called by all ranks; empties the context's record. Every rank returns all stages' sites.
    """
    sites = list(context.statistics)
    found = [context.statistics[site] for site in sites]
    context.statistics.clear()
    if found:
        counts = torch.stack([s.counts_JN for s in found])
        scalars = torch.stack([torch.stack((s.entropy_sum, s.aux_loss_sum, s.microbatches)) for s in found])
        for group in (topology.dp_group, topology.tp_group):
            for tensor in (counts, scalars):
                dist.all_reduce(tensor, group=group)
        # Every TP rank held the whole microbatch's loss, but only its own tokens' counts and entropy.
        scalars[:, 1:] /= topology.tp_size
        stage = {
            site: SiteStatistics(counts_JN, *of_site)
            for site, counts_JN, of_site in zip(sites, counts.cpu(), scalars.cpu(), strict=True)
        }
    else:
        stage = {}
    stages: list[dict[str, SiteStatistics]] = [{} for _ in range(topology.pp_size)]
    dist.all_gather_object(stages, stage, group=topology.pp_group)
    return {site: statistics for part in stages for site, statistics in part.items()}


class RoutingReport:
    """What the statistics of a recorded step say.

    Attributes:
        counts_JN: {site: top-k slots by task and expert, float64}, padding left out.

    Args:
        statistics: of all sites, see :func:`reduce_statistics`; empty where nothing is routed.
        config: of the run.
        task_names: in the order of the counts.
    """

    def __init__(self, statistics: dict[str, SiteStatistics], config: Config, task_names: Sequence[str]) -> None:
        self._statistics, self._config, self._task_names = statistics, config, list(task_names)
        self.counts_JN = {site: s.counts_JN[1:].double() for site, s in statistics.items()}
        self._load_N = {site: counts_JN.sum(dim=0) for site, counts_JN in self.counts_JN.items()}

    def metrics(self, of_sites: bool = False, tables: bool = False) -> Metrics:
        """Figures over all sites.

        Args:
            of_sites: those of each site too.
            tables: what is drawn, too.
        """
        if not self._statistics:
            return Metrics()
        loads = list(self._load_N.values())
        balances = torch.tensor([max_over_mean(load_N) for load_N in loads])
        information = [float(mutual_information(counts_JN)) for counts_JN in self.counts_JN.values()]
        scalars = {tag: float(balances.quantile(q)) for tag, q in BALANCE_QUANTILES.items()}
        scalars |= {
            "malora/load variation": stats.fmean(variation(load_N) for load_N in loads),
            "malora/effective experts": stats.fmean(effective_share(load_N) for load_N in loads),
            "malora/dead experts": float((torch.cat(loads) == 0).double().mean()),
            "malora/router entropy": stats.fmean(self._entropy(site) for site in self._statistics),
            "malora/aux loss": sum(self._aux_loss(site) for site in self._statistics),
            "malora/ideal aux loss": self._config.aux_loss_coeff * len(self._statistics),
            "malora/task information": stats.fmean(information),
            "malora/task information of the best site": max(information),
        }
        found = Metrics(scalars)
        if of_sites:
            self._add_sites(found)
        if tables:
            found.tables |= self._tables()
        return found

    def _entropy(self, site: str) -> float:
        """Of the router's distribution, nats per token."""
        return float(self._statistics[site].entropy_sum) / max(float(self._load_N[site].sum()) / self._config.topk, 1.0)

    def _aux_loss(self, site: str) -> float:
        """Mean over microbatches."""
        return float(self._statistics[site].aux_loss_sum) / max(float(self._statistics[site].microbatches), 1.0)

    def _add_sites(self, found: Metrics) -> None:
        for site, load_N in self._load_N.items():
            found.scalars[f"malora/balance/{site}"] = max_over_mean(load_N)
            found.scalars[f"malora/router entropy/{site}"] = self._entropy(site)
            found.counts[f"malora/tokens per expert/{site}"] = load_N.tolist()
            for task, row_N in zip(self._task_names, self.counts_JN[site], strict=True):
                found.counts[f"malora/tokens per task and expert/{site}/{task}"] = row_N.tolist()

    def _tables(self) -> dict[str, Table]:
        """Of each projection the load by layer and expert, and by task and expert; task information by site.

        Loads are relative to an even one: 1 is even. The columns of tasks' loads are called ``LAYER.EXPERT``.
        """
        tables, grid, experts = {}, self._grid(), range(self._config.num_experts)
        layers = [str(layer) for layer in next(iter(grid.values()))]
        for projection, sites in grid.items():
            loads = [_relative(self._load_N[site]).tolist() for site in sites.values()]
            tables[f"malora/load/{projection}"] = Table(layers, [str(e) for e in experts], loads)
            of_tasks = torch.cat([_relative(self.counts_JN[site]) for site in sites.values()], dim=1)
            columns = [f"{layer}.{e}" for layer in layers for e in experts]
            tables[f"malora/load of tasks/{projection}"] = Table(self._task_names, columns, of_tasks.tolist())
        bits = [[float(mutual_information(self.counts_JN[site])) for site in sites.values()] for sites in grid.values()]
        tables["malora/task information"] = Table(list(grid), layers, bits)
        return tables

    def _grid(self) -> dict[str, dict[int, str]]:
        """{projection: {layer: site}}, layers in order; a projection is in all layers."""
        grid: dict[str, dict[int, str]] = {}
        for site in self._statistics:
            _, layer, projection = site.split(".")
            grid.setdefault(projection, {})[int(layer)] = site
        return {projection: dict(sorted(sites.items())) for projection, sites in grid.items()}


def _relative(counts_N: Tensor) -> Tensor:
    """Counts [..., N] over their mean over the experts; zeros where there are none."""
    return counts_N / counts_N.mean(dim=-1, keepdim=True).clamp(min=1e-9)
