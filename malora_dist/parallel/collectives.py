"""Collectives with gradients, on the groups they are given.

Shape suffixes: W rows sent or kept by this rank, V rows received, G rows of all ranks, R ranks, C row width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def _all_to_all(rows: Tensor, send: Sequence[int], receive: Sequence[int], group: ProcessGroup) -> Tensor:
    received = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), list(receive), list(send), group=group)
    return received


class _AllToAllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: Sequence[int], receive: Sequence[int], group: ProcessGroup) -> Tensor:
        ctx.route = (send, receive, group)
        return _all_to_all(rows, send, receive, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        send, receive, group = ctx.route
        return _all_to_all(grad, receive, send, group), None, None, None


def all_to_all_rows(rows_WC: Tensor, send: Sequence[int], receive: Sequence[int], group: ProcessGroup) -> Tensor:
    """Send ``send[r]`` consecutive rows to rank r of the group, receive ``receive[r]`` from it. [V, C]

    Counts may be zero. The gradient goes back the same way.
    """
    return _AllToAllRows.apply(rows_WC, tuple(send), tuple(receive), group)


class _Transfer:
    """An all-to-all under way, forward or backward, with the buffers it uses until it has ended."""

    def __init__(self, send: Sequence[int], receive: Sequence[int], group: ProcessGroup) -> None:
        self._send, self._receive, self._group = list(send), list(receive), group
        self._work: Any = None
        self._buffers: tuple[Tensor, Tensor] | None = None

    def start(self, rows: Tensor, is_backward: bool = False) -> Tensor:
        send, receive = (self._receive, self._send) if is_backward else (self._send, self._receive)
        received, rows = rows.new_empty(sum(receive), *rows.shape[1:]), rows.contiguous()
        self._work = dist.all_to_all_single(received, rows, receive, send, group=self._group, async_op=True)
        self._buffers = rows, received
        return received

    def wait(self) -> Tensor:
        assert self._buffers is not None, "started first"
        self._work.wait()
        received = self._buffers[1]
        self._work = self._buffers = None
        return received


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        return transfer.start(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.transfer.wait(), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, received: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        return transfer.wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.transfer.start(grad, is_backward=True)
        return grad, None  # autograd wants a gradient of this shape here; _Start takes the transfer's instead


def start_all_to_all_rows(
    rows_WC: Tensor, send: Sequence[int], receive: Sequence[int], group: ProcessGroup
) -> Callable[[], Tensor]:
    """:func:`all_to_all_rows` in two parts: this starts it, what it returns waits for it.

    What is computed in between runs while the rows travel. Backward likewise: the gradient starts
    to travel where the forward waited and is waited for where the forward started; autograd runs
    in between the backward of what was computed in between.
    """
    transfer = _Transfer(send, receive, group)
    received_VC = _Start.apply(rows_WC, transfer)
    return lambda: _Wait.apply(received_VC, transfer)


def exchange_counts(send_R: Tensor, group: ProcessGroup) -> Tensor:
    """How many rows each rank of the group will send here, given what this rank sends. int64 [R], or [R, any]"""
    receive_R = torch.empty_like(send_R)
    dist.all_to_all_single(receive_R, send_R, group=group)
    return receive_R


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_WC: Tensor, counts: Sequence[int], group: ProcessGroup) -> Tensor:
        ctx.route = (counts, group)
        return _gather_rows(rows_WC, counts, group)

    @staticmethod
    def backward(ctx: Any, grad_GC: Tensor) -> tuple[Tensor, None, None]:
        return _reduce_scatter_rows(grad_GC, *ctx.route), None, None


class _ReduceScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_GC: Tensor, counts: Sequence[int], group: ProcessGroup) -> Tensor:
        ctx.route = (counts, group)
        return _reduce_scatter_rows(rows_GC, counts, group)

    @staticmethod
    def backward(ctx: Any, grad_WC: Tensor) -> tuple[Tensor, None, None]:
        return _gather_rows(grad_WC, *ctx.route), None, None


# As all-to-alls: gloo and NCCL take uneven rows there, but not in all_gather and reduce_scatter.
def _gather_rows(rows_WC: Tensor, counts: Sequence[int], group: ProcessGroup) -> Tensor:
    copies = rows_WC.repeat(group.size(), *(1 for _ in rows_WC.shape[1:]))
    return _all_to_all(copies, [rows_WC.shape[0]] * group.size(), counts, group)


def _reduce_scatter_rows(rows_GC: Tensor, counts: Sequence[int], group: ProcessGroup) -> Tensor:
    own = counts[group.rank()]
    parts = _all_to_all(rows_GC, counts, [own] * group.size(), group)
    return parts.view(group.size(), own, *rows_GC.shape[1:]).sum(dim=0)


def gather_rows(rows_WC: Tensor, counts: Sequence[int], group: ProcessGroup) -> Tensor:
    """The rows of all ranks, in the order of the ranks, of which rank r has ``counts[r]``. [G, C]

    The gradient is summed over the ranks: each of them works with the rows in its own way.
    """
    return _GatherRows.apply(rows_WC, tuple(counts), group)


def reduce_scatter_rows(rows_GC: Tensor, counts: Sequence[int], group: ProcessGroup) -> Tensor:
    """Sum equally long tensors over the ranks; rank r keeps its ``counts[r]`` rows of the sum. [W, C]"""
    return _ReduceScatterRows.apply(rows_GC, tuple(counts), group)
