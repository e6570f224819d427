"""Bytes that this rank's collectives move, and how long it waits for them, by process group.

Counted where torch dispatches them, so megatron's own are in it and nothing has to report itself.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work
from torch.utils._python_dispatch import TorchDispatchMode

from malora_dist.parallel.timing import Spans, around_waits
from malora_dist.parallel.topology import Topology

#: Names of process groups; any other is ``other``.
GROUPS = ("tp", "ep", "dp", "edp", "pp", "other")

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
        super().__init__()
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
        self._last = ""
        self._patches = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._patches.enter_context(around_waits(self._wait))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if isinstance(func, torch._ops.OpOverload) and func.namespace == "c10d":
            return self._collective(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _collective(self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        group = next(ProcessGroup.unbox(box) for box in _boxes(args))
        if group.size() == 1:
            return func(*args, **kwargs)
        self._last = label = self._label(group)
        operator = func.name().removeprefix("c10d::").split(".")[0]
        if operator in _BUFFER:
            self.bytes[label] += _size(args[_BUFFER[operator]])
        with self.spans.span(label):
            result = func(*args, **kwargs)
        for box in _boxes(result if isinstance(result, tuple) else (result,)):
            work = Work.unbox(box)  # the very object that the caller will wait for; None inside what is coalesced
            if work is not None:
                self._under_way[work] = label
        return result

    def _wait(self, work: Work) -> AbstractContextManager[object]:
        """Work that no operator has returned is of several that were coalesced, just before."""
        label = self._under_way.pop(work, self._last)
        return self.spans.span(label) if label else contextlib.nullcontext()

    def _label(self, group: ProcessGroup) -> str:
        known = self._by_name.get(group.group_name)
        return known or self._by_ranks.get(tuple(dist.get_process_group_ranks(group)), "other")


def _boxes(values: Sequence[Any]) -> Iterator[Any]:
    """What torch hands to its operators, and they return, as objects in boxes: a group; a work."""
    return (value for value in values if isinstance(value, torch.ScriptObject))


def _size(buffer: Tensor | list[Any]) -> int:
    return buffer.nbytes if isinstance(buffer, Tensor) else sum(_size(part) for part in buffer)
