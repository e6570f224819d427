"""Collectives with gradients, on the groups they are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from malora_dist.errors import MaloraError

T = TypeVar("T")


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
    rows: Tensor, send: Sequence[int], receive: Sequence[int], group: ProcessGroup
) -> Callable[[], Tensor]:
    """Start to send ``send[r]`` consecutive rows to rank r of the group; what it returns waits for what comes.

    ``receive[r]`` rows come from rank r; counts may be zero.

    What is computed in between runs while the rows travel. Backward likewise: the gradient starts
    to travel where the forward waited and is waited for where the forward started; autograd runs
    in between the backward of what was computed in between.
    """
    transfer = _Transfer(send, receive, group)
    received = _Start.apply(rows, transfer)
    return lambda: _Wait.apply(received, transfer)


def exchange_counts(to_send: Tensor, group: ProcessGroup) -> Tensor:
    """How many rows each rank of the group will send here, given what this rank sends. int64 [ranks, ...]"""
    to_receive = torch.empty_like(to_send)
    dist.all_to_all_single(to_receive, to_send, group=group)
    return to_receive


def first_fault(fault: str) -> str:
    """What a rank has met that cannot go on, so that all stop for the same reason; called by all ranks.

    Args:
        fault: of this rank; empty: none.

    Returns:
        that of the lowest rank that has one; empty: none has.
    """
    faults: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(faults, fault)
    return next(filter(None, faults), "")


def on_one_rank(is_here: bool, action: Callable[[], T], kind: type[MaloraError] = MaloraError) -> T | None:
    """Let one rank act; called by all ranks.

    Args:
        is_here: whether this is the one.
        kind: of the error.

    Returns:
        what the action returns, on the rank that acts.

    Raises:
        MaloraError: the action has raised one; the same on all ranks.
    """
    result: T | None = None
    error: MaloraError | None = None
    if is_here:
        try:
            result = action()
        except MaloraError as raised:
            error = raised
    fault = first_fault(str(error) if error else "")
    if fault:
        raise kind(fault) from error
    return result
