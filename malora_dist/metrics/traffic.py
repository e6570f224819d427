"""Bytes that this rank's collectives move, by process group.

Counted where torch dispatches them, so megatron's own are in it and nothing has to report itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

from malora_dist.parallel.topology import Topology

#: {operator of torch.ops.c10d: the argument with the larger of its buffers}: what all ranks'
#: shards make together for all_gather and reduce_scatter, what this rank sends for the others.
_BUFFER = {
    "allreduce_": 0,
    "allreduce_coalesced_": 0,
    "broadcast_": 0,
    "reduce_": 0,
    "allgather_": 0,
    "_allgather_base_": 0,
    "allgather_into_tensor_coalesced_": 0,
    "reduce_scatter_": 1,
    "_reduce_scatter_base_": 1,
    "reduce_scatter_tensor_coalesced_": 1,
    "alltoall_": 1,
    "alltoall_base_": 1,
    "gather_": 1,
    "scatter_": 0,
    "send": 0,
}


class TrafficCounter(TorchDispatchMode):
    """While active, adds up the bytes of this rank's collectives.

    A group is called ``tp``, ``ep``, ``pp``, ``dp`` or ``edp`` (the ranks that hold the same
    experts); megatron's further groups over the same ranks get the same name, any other is
    ``other``. Groups of one rank move nothing.

    Attributes:
        bytes: {group: bytes}.
    """

    def __init__(self, topology: Topology) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        groups = {
            "dp": topology.dp_group,
            "edp": topology.edp_group,
            "tp": topology.tp_group,
            "pp": topology.pp_group,
            "ep": topology.ep_group,
        }
        self._by_name = {group.group_name: label for label, group in groups.items()}
        self._by_ranks: dict[tuple[int, ...], str] = {}
        for label, group in groups.items():
            self._by_ranks.setdefault(tuple(dist.get_process_group_ranks(group)), label)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if isinstance(func, torch._ops.OpOverload) and func.namespace == "c10d":
            self._count(func.name().removeprefix("c10d::").split(".")[0], args)
        return func(*args, **(kwargs or {}))

    def _count(self, operator: str, args: tuple[Any, ...]) -> None:
        if operator in _BUFFER:
            group = ProcessGroup.unbox(next(a for a in args if isinstance(a, torch.ScriptObject)))
            if group.size() > 1:
                self.bytes[self._label(group)] += _size(args[_BUFFER[operator]])

    def _label(self, group: ProcessGroup) -> str:
        known = self._by_name.get(group.group_name)
        return known or self._by_ranks.get(tuple(dist.get_process_group_ranks(group)), "other")


def _size(buffer: Tensor | list[Any]) -> int:
    return buffer.nbytes if isinstance(buffer, Tensor) else sum(_size(part) for part in buffer)
