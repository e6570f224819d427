"""Dispatch through FastMoE's own scatter and gather; the only file that imports fmoe.

FastMoE is built from source (https://github.com/laekov/fastmoe, not on PyPI) and runs on CUDA
tensors only. One row per (token, expert) travels, in expert-major order on arrival; the gates stay
at home and weigh the rows on return. Each direction has its own width: D out, O back. What has and
has not run on real fmoe stands in docs/fastmoe.md. Shape suffixes: see malora_dist/methods/base.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from malora_dist.errors import BackendUnavailableError
from malora_dist.exchange.base import Dispatched, Exchange, Returning, Site, register
from malora_dist.kernels.experts import Tokens
from malora_dist.methods.routing import Routing

_CURE = "use dispatch=all_to_all, which computes the same"


class _Handle(NamedTuple):
    pos: Tensor
    local_expert_count: Tensor
    global_expert_count: Tensor
    gates_TK: Tensor


def load_fmoe_functions(device: torch.device, num_ranks: int) -> ModuleType:
    """``fmoe.functions``, if it can run on ``device``.

    Importable is not usable: on CPU tensors fmoe ends the process, and a build without NCCL has
    no global_scatter.

    Raises:
        BackendUnavailableError: no CUDA device, no fmoe, or fmoe built without NCCL.
    """
    if device.type != "cuda":
        raise BackendUnavailableError(
            f"dispatch='fastmoe': fmoe works on CUDA tensors only, not on {device.type}; {_CURE}"
        )
    try:
        functions = importlib.import_module("fmoe.functions")
        kernels = importlib.import_module("fmoe_cuda")
    except ImportError as error:
        raise BackendUnavailableError(
            f"dispatch='fastmoe': fmoe cannot be imported ({error}); build it from source (not on PyPI), or {_CURE}"
        ) from error
    if num_ranks > 1 and not hasattr(kernels, "global_scatter"):
        raise BackendUnavailableError(
            f"dispatch='fastmoe': this fmoe was built without NCCL; rebuild it with USE_NCCL=1, or {_CURE}"
        )
    return functions


class _ContiguousGradient(torch.autograd.Function):
    """The same tensor, whose gradient comes back contiguous: fmoe hands it to native code that insists on that."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


@register("fastmoe")
class FastMoE(Exchange):
    """fmoe's MOEScatter and MOEGather.

    fmoe keeps one communicator per device for the life of the process: one expert-parallel group
    can use it.

    Args:
        functions: ``fmoe.functions``; None: the installed one (see :func:`load_fmoe_functions`).
    """

    def __init__(
        self, num_experts: int, group: ProcessGroup, device: torch.device, functions: Any | None = None
    ) -> None:
        super().__init__(num_experts, group, device)
        self._fmoe = load_fmoe_functions(device, self._ranks) if functions is None else functions

    @classmethod
    def bytes_sent(cls, site: Site) -> float:
        """One row per (token, expert) out, one back, and their gradients: 2 T k (EP - 1) / EP (D + O) numbers."""
        ep = site.expert_parallel
        rows = site.tokens_here * site.method.settings.topk * (ep - 1) / ep
        return 2 * rows * (site.sent_width + site.returned_width) * site.itemsize

    def dispatch(self, z: Sequence[Tensor], routings: Sequence[Routing]) -> list[Dispatched]:
        return [self._dispatch(z_TD, routing) for z_TD, routing in zip(z, routings, strict=True)]

    def _dispatch(self, z_TD: Tensor, routing: Routing) -> Dispatched:
        if self._ranks > 1:
            self._fmoe.ensure_comm(z_TD, self._group)
        pos, local_count, global_count, expert_count, num_rows = self._fmoe.prepare_forward(
            routing.experts_TK.contiguous(), self._experts_per_rank, self._ranks
        )
        topk = routing.experts_TK.shape[-1]
        token_of_pos = pos.div(topk, rounding_mode="floor")
        rows = self._fmoe.MOEScatter.apply(
            z_TD.contiguous(), token_of_pos, local_count, global_count, num_rows, self._ranks
        )
        expert_of_row = torch.arange(self._experts_per_rank).repeat_interleave(expert_count.cpu()).to(z_TD.device)
        ones = routing.gates_TK.new_ones(expert_of_row.shape[0], 1)
        tokens = Tokens(_ContiguousGradient.apply(rows), ones, expert_of_row.unsqueeze(1))
        return Dispatched(tokens, _Handle(pos, local_count, global_count, routing.gates_TK))

    def send_back(self, rows: Tensor, dispatched: Dispatched) -> Returning:
        handle: _Handle = dispatched.handle
        num_tokens, topk = handle.gates_TK.shape
        slots = self._fmoe.MOEGather.apply(
            rows.contiguous(),
            handle.pos,
            handle.local_expert_count,
            handle.global_expert_count,
            num_tokens * topk,
            self._ranks,
        )
        by_slot = _ContiguousGradient.apply(slots).view(num_tokens, topk, -1)
        sums = (by_slot * handle.gates_TK.to(slots.dtype).unsqueeze(-1)).sum(dim=1)
        return lambda: (sums, torch.arange(num_tokens, device=sums.device))
