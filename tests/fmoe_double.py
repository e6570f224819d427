"""A double of `fmoe.functions`: the four names FastMoEDispatcher calls, on CPU tensors over gloo.

Written from FastMoE's documented flow (June 2024), for contract tests on machines that cannot run
fmoe. It is not fmoe: what has run on real fmoe stands in docs/fastmoe.md.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def _exchange(rows: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
    out = rows.new_empty(sum(receive), rows.shape[1])
    dist.all_to_all_single(out, rows.contiguous(), receive, send, group=group)
    return out


class FmoeFunctionsDouble:
    """Like the module: `ensure_comm` fixes the group for the life of the process; experts are worker-major."""

    def __init__(self) -> None:
        self.group: Any = None
        double = self

        class Scatter(torch.autograd.Function):
            @staticmethod
            def forward(
                ctx: Any, inp: Tensor, pos: Tensor, local: Tensor, world: Tensor, rows: int, size: int
            ) -> Tensor:
                assert inp.is_contiguous()
                assert inp.dim() == 2
                ctx.args = pos, local, world, size, inp.shape[0]
                return double.to_experts(inp[pos], local, world, size)

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Any:
                assert grad.is_contiguous(), "fmoe hands it to native code as it is"
                pos, local, world, size, batch = ctx.args
                home = double.to_home(grad, local, world, size)
                return grad.new_zeros(batch, grad.shape[1]).index_add_(0, pos, home), None, None, None, None, None

        class Gather(torch.autograd.Function):
            @staticmethod
            def forward(
                ctx: Any, rows: Tensor, pos: Tensor, local: Tensor, world: Tensor, batch: int, size: int
            ) -> Tensor:
                assert rows.is_contiguous()
                assert rows.dim() == 2
                ctx.args = pos, local, world, size
                return rows.new_zeros(batch, rows.shape[1]).index_copy_(
                    0, pos, double.to_home(rows, local, world, size)
                )

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Any:
                assert grad.is_contiguous(), "fmoe hands it to native code as it is"
                pos, local, world, size = ctx.args
                return double.to_experts(grad[pos], local, world, size), None, None, None, None, None

        self.MOEScatter, self.MOEGather = Scatter, Gather

    def ensure_comm(self, _tensor: Tensor, group: Any) -> None:
        self.group = self.group or group

    def prepare_forward(
        self, gate: Tensor, num_expert: int, world_size: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        """Positions (indices into the flattened slots, sorted by expert) and counts on the CPU."""
        flat = gate.flatten()
        pos = torch.sort(flat, stable=True).indices
        local = torch.bincount(flat, minlength=num_expert * world_size)
        world = local.clone()
        if world_size > 1:
            dist.all_to_all_single(world, local, group=self.group)
        per_expert = world.view(world_size, num_expert).sum(0)
        return pos, local, world, per_expert, int(per_expert.sum())

    def to_experts(self, rows: Tensor, local: Tensor, world: Tensor, size: int) -> Tensor:
        """Rows sorted by global expert -> rows of this worker's experts, expert-major."""
        if size == 1:
            return rows
        send, receive = local.view(size, -1), world.view(size, -1)
        got = _exchange(rows, send.sum(1).tolist(), receive.sum(1).tolist(), self.group)
        return got[self._expert_major(receive)]

    def to_home(self, rows: Tensor, local: Tensor, world: Tensor, size: int) -> Tensor:
        """The inverse of :meth:`to_experts`."""
        if size == 1:
            return rows
        send, receive = local.view(size, -1), world.view(size, -1)
        order = self._expert_major(receive)
        back = torch.empty_like(rows)
        back[order] = rows
        return _exchange(back, receive.sum(1).tolist(), send.sum(1).tolist(), self.group)

    @staticmethod
    def _expert_major(receive: Tensor) -> Tensor:
        """Order that turns worker-major rows into expert-major ones. receive [workers, experts]"""
        workers, experts = receive.shape
        expert_of_row = torch.arange(experts).repeat(workers).repeat_interleave(receive.flatten())
        return torch.sort(expert_of_row, stable=True).indices
