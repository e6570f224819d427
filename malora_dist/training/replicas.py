"""Whether the ranks that hold the same parameter hold the same bits.

Nothing makes replicas agree but that they start alike and get the same updates. A flipped bit, a broken link or a wrong
mark would let them drift apart with no other sign than worse losses.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from malora_dist.config import Config
from malora_dist.errors import TrainingError
from malora_dist.layers.adapted_linear import is_adapter_key
from malora_dist.layers.decoder import CausalModel
from malora_dist.parallel.topology import Topology
from malora_dist.training.callbacks import Callback, Step
from malora_dist.training.parameters import globally_named

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: Tensor) -> Tensor:
    """The bits of a tensor as one int64 on its device: the sum of its elements' bits times 1, 3, 5, ..., modulo 2^64.

    One changed element always changes it, as an odd number divides no power of two; elements that change places do too.
    """
    bits = tensor.detach().contiguous().view(-1).view(_BITS[tensor.element_size()]).long()
    weights = 2 * torch.arange(bits.numel(), device=bits.device) + 1
    return (bits * weights).sum()


class Replica(NamedTuple):
    """A parameter, or the shard of it, of which other ranks have the same.

    Attributes:
        name: in the whole model.
        tp_rank: whose shard; 0 where all TP ranks have the whole.
        ep_rank: whose experts; 0 where it has no expert axis.
    """

    name: str
    tp_rank: int
    ep_rank: int


class CheckReplicas(Callback):
    """Every ``check_replicas_interval`` steps, and whenever :meth:`check` is called; at an interval of 0 never.

    Adapters are checked, trained and frozen ones. The axes of a parameter say who else has it: without an expert axis
    the data-parallel ranks, else those with the same experts; without one that TP shards, the TP ranks too.
    """

    def __init__(self, config: Config, model: Sequence[CausalModel], topology: Topology) -> None:
        self._interval, self._topology = config.check_replicas_interval, topology
        self._checked_at = -1
        self._parameters: dict[Replica, Any] = {}  # with megatron's marks
        named: dict[str, Any] = globally_named(model)
        for name, parameter in named.items():
            if is_adapter_key(name):
                tp_rank = topology.tp_rank if parameter.tensor_model_parallel else 0
                ep_rank = 0 if parameter.allreduce else topology.ep_rank
                self._parameters[Replica(name, tp_rank, ep_rank)] = parameter

    def after_step(self, step: Step) -> None:
        if self._interval and step.iteration % self._interval == 0:
            self.check(step.iteration)

    @torch.no_grad()
    def check(self, iteration: int) -> None:
        """Compare all replicas, once after an iteration; called by all ranks.

        Raises:
            TrainingError: on every rank, naming the first parameter whose replicas differ and the ranks.
        """
        if not self._interval or self._checked_at == iteration:
            return
        self._checked_at = iteration
        sums = {replica: checksum(parameter) for replica, parameter in self._parameters.items()}
        if not self._differ(sums):
            return
        of_ranks: list[dict[Replica, int]] = [{} for _ in range(self._topology.world_size)]
        dist.all_gather_object(of_ranks, {replica: int(value) for replica, value in sums.items()})
        raise TrainingError(
            f"iteration {iteration}: {describe_differences(of_ranks)}; this state is not saved: go on from the last "
            "checkpoint, and check the memory and the links of that machine if it happens again"
        )

    def _differ(self, sums: Mapping[Replica, Tensor]) -> bool:
        """Whether any rank found a difference: one small collective for each group, and one over all ranks."""
        topology, marked = self._topology, self._parameters
        shared_over = (
            (topology.dp_group, [r for r, p in marked.items() if p.allreduce]),
            (topology.edp_group, [r for r, p in marked.items() if not p.allreduce]),
            (topology.tp_group, [r for r, p in marked.items() if not p.tensor_model_parallel]),
        )
        found = torch.zeros((), dtype=torch.int64, device=topology.device)
        for group, replicas in shared_over:
            if group.size() > 1 and replicas:
                own = torch.stack([sums[replica] for replica in replicas])
                extremes = torch.stack((own, ~own))  # ~ turns the order round, so one maximum gives both ends
                dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
                found += (extremes[0] != ~extremes[1]).any()
        dist.all_reduce(found)
        return bool(found > 0)


def describe_differences(of_ranks: Sequence[Mapping[Replica, int]]) -> str:
    """In words, the first replica that is not the same everywhere: which ranks differ from most of the others.

    Args:
        of_ranks: the checksums of each rank's replicas.
    """
    holders: dict[Replica, dict[int, int]] = defaultdict(dict)
    for rank, sums in enumerate(of_ranks):
        for replica, value in sums.items():
            holders[replica][rank] = value
    differing = {replica: values for replica, values in holders.items() if len(set(values.values())) > 1}
    replica, values = next(iter(differing.items()))
    number = len({replica.name for replica in differing})
    more = f", and of {number - 1} more parameters" if number > 1 else ""
    (common, most), (_, second) = Counter(values.values()).most_common(2)
    if most == second:
        return f"the copies of {replica.name}{more} on ranks {_listed(values)} should be equal and differ"
    odd = [rank for rank, value in values.items() if value != common]
    same = [rank for rank, value in values.items() if value == common]
    ranks = "rank" if len(odd) == 1 else "ranks"
    return f"the copy of {replica.name}{more} on {ranks} {_listed(odd)} differs from that on ranks {_listed(same)}"


def _listed(ranks: Iterable[int], most: int = 8) -> str:
    """The first few ranks: "0, 1 and 3"."""
    first = [str(rank) for rank in ranks]
    if len(first) > most:
        return f"{', '.join(first[:most])} and {len(first) - most} more"
    return " and ".join(filter(None, (", ".join(first[:-1]), first[-1])))
