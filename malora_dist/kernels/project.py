"""What comes before dispatch: the shared projection and the router, in one read of x.

Shape suffixes: see malora_dist/methods/base.py. D is the width of all stacked projections together.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _bf16_parts(wide: Tensor) -> list[Tensor]:
    """Three bfloat16 tensors whose sum is a float32 one, bit by bit: 3 x 8 bits of mantissa."""
    parts = []
    for _ in range(3):
        parts.append(wide.bfloat16())
        wide = wide - parts[-1].float()
    return parts


def _matmul_float32(a: Tensor, b: Tensor) -> Tensor:
    """The product of bfloat16 matrices in float32. Neither a CPU nor torch.compile knows the kernel."""
    if a.is_cuda and not torch.compiler.is_compiling():
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


class _Project(torch.autograd.Function):
    """z = x S^T in x's dtype and logits = x R^T in float32, in one product that reads x once, in its own dtype.

    On a GPU a bfloat16 x is never copied to float32: R is split into three bfloat16 matrices, whose products with x,
    summed in float32, are as exact and run on tensor cores. Only dx, bfloat16 itself, takes the gradient of the logits
    in bfloat16.
    """

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, down_DI: Tensor, router_NI: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x_TI, down_DI, router_NI)
        width, experts = down_DI.shape[0], router_NI.shape[0]
        if x_TI.dtype == torch.bfloat16:
            stacked = torch.cat((down_DI.bfloat16(), *_bf16_parts(router_NI)))
            z_TD, parts = _matmul_float32(x_TI, stacked.t()).split((width, 3 * experts), dim=-1)
            return z_TD.bfloat16(), parts.unflatten(-1, (3, experts)).sum(dim=1)
        both = F.linear(x_TI.to(router_NI.dtype), torch.cat((down_DI.to(router_NI.dtype), router_NI)))
        z_TD, logits_TN = both.split((width, experts), dim=-1)
        return z_TD.to(x_TI.dtype).contiguous(), logits_TN.contiguous()

    @staticmethod
    def backward(ctx: Any, dz_TD: Tensor, dlogits_TN: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x_TI, down_DI, router_NI = ctx.saved_tensors
        width, experts = down_DI.shape[0], router_NI.shape[0]
        dx = d_down = d_router = None
        in_bf16 = x_TI.dtype == torch.bfloat16
        dtype = x_TI.dtype if in_bf16 else router_NI.dtype
        if ctx.needs_input_grad[0]:
            factor = torch.cat((down_DI.to(dtype), router_NI.to(dtype)))
            dx = (torch.cat((dz_TD.to(dtype), dlogits_TN.to(dtype)), dim=-1) @ factor).to(x_TI.dtype)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            if in_bf16:
                grad = torch.cat((dz_TD, *_bf16_parts(dlogits_TN)), dim=-1)
                d_down, parts = _matmul_float32(grad.t(), x_TI).split((width, 3 * experts))
                d_router = parts.unflatten(0, (3, experts)).sum(dim=0)
            else:
                grad = torch.cat((dz_TD.to(dtype), dlogits_TN), dim=-1)
                d_down, d_router = (grad.t() @ x_TI.to(dtype)).split((width, experts))
            d_down = d_down.to(down_DI.dtype)
        return dx, d_down, d_router


def project_and_score(x_TI: Tensor, down_DI: Tensor, router_NI: Tensor) -> tuple[Tensor, Tensor]:
    """x S^T and :func:`~malora_dist.methods.routing.router_logits` of the same x, for any number of adapters stacked.

    Returns:
        z [T, D] in x's dtype, and the logits [T, N] in float32 (or wider).
    """
    wide = torch.promote_types(x_TI.dtype, torch.float32)
    return _Project.apply(x_TI, down_DI, router_NI.to(wide))
