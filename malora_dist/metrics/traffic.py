"""Bytes that this rank's collectives move, and how long it waits for them, by process group.

Counted where torch.distributed asks a process group for them, so megatron's own are in it and nothing has to report
itself.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Self

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from malora_dist.parallel.timing import Spans, around_collectives
from malora_dist.parallel.topology import Topology

#: Names of process groups; any other is ``other``.
GROUPS = ("tp", "ep", "dp", "edp", "pp", "other")

#: {method of a process group: the argument with the larger of its buffers}: what all ranks' shards make together for
#: all_gather and reduce_scatter, what this rank sends for the others. None: nothing of its own. The newer names of some
#: are of torch 2.13.
BUFFERS: dict[str, int | None] = {
    "allreduce": 0,
    "allreduce_coalesced": 0,
    "broadcast": 0,
    "reduce": 0,
    "allgather": 0,
    "allgather_coalesced": 0,
    "_allgather_base": 0,
    "all_gather_single": 0,
    "allgather_into_tensor_coalesced": 0,
    "all_gather_single_coalesced": 0,
    "reduce_scatter": 1,
    "_reduce_scatter_base": 1,
    "reduce_scatter_single": 1,
    "reduce_scatter_tensor_coalesced": 1,
    "reduce_scatter_single_coalesced": 1,
    "alltoall": 1,
    "alltoall_base": 1,
    "all_to_all_single": 1,
    "gather": 1,
    "scatter": 0,
    "send": 0,
    "recv": None,
    "recv_anysource": None,
    "barrier": None,
    "_end_coalescing": None,
}


class TrafficCounter:
    """While active, adds up the bytes of this rank's collectives, and the time in which they keep it from working.

    A group is called ``tp``, ``ep``, ``pp``, ``dp`` or ``edp`` (the ranks that hold the same
    experts); megatron's further groups over the same ranks get the same name, any other is
    ``other``. Groups of one rank move nothing.

    What counts as time is starting a collective, which some backends and modes do not return from before it is done,
    and waiting for it: a transfer behind which the rank computes costs nothing.

    Attributes:
        bytes: {group: bytes}.
        spans: the time of each group.

    Args:
        spans: what notes the time; by default its own.
    """

    def __init__(self, topology: Topology, spans: Spans | None = None) -> None:
        self.bytes: Counter[str] = Counter()
        self.spans = spans or Spans(topology.device)
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
        self._under_way: dict[Work, str] = {}  # what has not been waited for, and its group
        self._patches = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._patches.enter_context(around_collectives(BUFFERS, self._call, self._wait))
        return self

    def __exit__(self, *error: Any) -> None:
        self._patches.close()

    def _call(self, group: ProcessGroup, method: str, args: tuple[Any, ...], call: Callable[[], Work | None]) -> Any:
        if group.size() == 1:
            return call()
        label, buffer = self._label(group), BUFFERS[method]
        if buffer is not None:
            self.bytes[label] += _size(args[buffer])
        with self.spans.span(label):
            work = call()
        if work is not None:  # None inside what is coalesced
            self._under_way[work] = label
        return work

    def _wait(self, work: Work) -> AbstractContextManager[object]:
        label = self._under_way.pop(work, None)
        return self.spans.span(label) if label else contextlib.nullcontext()

    def _label(self, group: ProcessGroup) -> str:
        known = self._by_name.get(group.group_name)
        return known or self._by_ranks.get(tuple(dist.get_process_group_ranks(group)), "other")


def _size(buffer: Tensor | list[Any]) -> int:
    return buffer.nbytes if isinstance(buffer, Tensor) else sum(_size(part) for part in buffer)
