"""Collectives with gradients, on the groups they are given.

Shape suffixes: W rows sent, V rows received, C row width.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def exchange_counts(send_R: Tensor, group: ProcessGroup) -> Tensor:
    """How many rows each rank of the group will send here, given what this rank sends. int64 [R]"""
    receive_R = torch.empty_like(send_R)
    dist.all_to_all_single(receive_R, send_R, group=group)
    return receive_R
