"""Expert balance from the routing statistics of all ranks.

Shape suffixes: see methods/base.py; J tasks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from malora_dist.layers.routing_context import RoutingContext, SiteStatistics
from malora_dist.metrics.loggers.base import Metrics
from malora_dist.parallel.topology import Topology


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


def balance(counts_N: Tensor) -> float:
    """Load of the busiest expert over the mean load: 1 is even, N is all on one expert."""
    return float(counts_N.max() / counts_N.mean().clamp(min=1e-9))


def report_routing(statistics: dict[str, SiteStatistics], topk: int, task_names: Sequence[str]) -> Metrics:
    """Balance (max/mean load), router entropy (nats per token), aux loss and top-k slots per expert.

    Per adapted projection and overall.
    """
    scalars: dict[str, float] = {}
    counts: dict[str, list[float]] = {}
    balances, entropies, aux_loss = [], [], 0.0
    for site, s in statistics.items():
        counts_N = s.counts_JN[1:].sum(dim=0)
        balances.append(balance(counts_N))
        entropies.append(float(s.entropy_sum) / max(float(counts_N.sum()) / topk, 1.0))
        aux_loss += float(s.aux_loss_sum) / max(float(s.microbatches), 1.0)
        scalars[f"malora/balance/{site}"] = balances[-1]
        scalars[f"malora/router entropy/{site}"] = entropies[-1]
        counts[f"malora/tokens per expert/{site}"] = counts_N.tolist()
        for task, row_N in zip(task_names, s.counts_JN[1:], strict=True):
            counts[f"malora/tokens per task and expert/{site}/{task}"] = row_N.tolist()
    if statistics:
        scalars["malora/aux loss"] = aux_loss
        scalars["malora/balance"] = sum(balances) / len(balances)
        scalars["malora/worst balance"] = max(balances)
        scalars["malora/router entropy"] = sum(entropies) / len(entropies)
    return Metrics(scalars, counts)
