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


def _knows_float32_sums(x: Tensor) -> bool:
    """Whether a product of these may be in float32; bfloat16 on a GPU, outside torch.compile."""
    return x.dtype == torch.bfloat16 and x.is_cuda and not torch.compiler.is_compiling()


class _Project(torch.autograd.Function):
    """z = x S^T in x's dtype and logits = x R^T in float32.

    On a GPU a bfloat16 x is read once and never copied to float32: R is split into three bfloat16 matrices below S,
    whose products with x, summed in float32, are as exact and run on tensor cores. Elsewhere x is copied for the
    router alone. Only dx, narrow itself, takes the gradient of the logits in x's dtype.
    """

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, down_DI: Tensor, router_NI: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x_TI, down_DI, router_NI)
        widths = down_DI.shape[0], router_NI.shape[0]
        if _knows_float32_sums(x_TI):
            stacked = torch.cat((down_DI.bfloat16(), *_bf16_parts(router_NI)))
            z_TD, parts = torch.mm(x_TI, stacked.t(), out_dtype=torch.float32).split((widths[0], 3 * widths[1]), dim=-1)
            return z_TD.bfloat16(), parts.unflatten(-1, (3, widths[1])).sum(dim=1)
        if x_TI.dtype == router_NI.dtype:
            stacked = torch.cat((down_DI.to(router_NI.dtype), router_NI))
            z_TD, logits_TN = F.linear(x_TI, stacked).split(widths, dim=-1)
            return z_TD.contiguous(), logits_TN.contiguous()
        return F.linear(x_TI, down_DI.to(x_TI.dtype)), F.linear(x_TI.to(router_NI.dtype), router_NI)

    @staticmethod
    def backward(ctx: Any, dz_TD: Tensor, dlogits_TN: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x_TI, down_DI, router_NI = ctx.saved_tensors
        widths = down_DI.shape[0], router_NI.shape[0]
        dtype = x_TI.dtype
        dx = d_down = d_router = None
        if ctx.needs_input_grad[0]:
            factor = torch.cat((down_DI.to(dtype), router_NI.to(dtype)))
            dx = torch.cat((dz_TD, dlogits_TN.to(dtype)), dim=-1) @ factor
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            if _knows_float32_sums(x_TI):
                grad = torch.cat((dz_TD, *_bf16_parts(dlogits_TN)), dim=-1)
                d_down, parts = torch.mm(grad.t(), x_TI, out_dtype=torch.float32).split((widths[0], 3 * widths[1]))
                d_router = parts.unflatten(0, (3, widths[1])).sum(dim=0)
            elif dtype == router_NI.dtype:
                d_down, d_router = (torch.cat((dz_TD, dlogits_TN), dim=-1).t() @ x_TI).split(widths)
            else:
                d_down, d_router = dz_TD.t() @ x_TI, dlogits_TN.t() @ x_TI.to(router_NI.dtype)
            d_down = d_down.to(down_DI.dtype)
        return dx, d_down, d_router


def project_and_score(x_TI: Tensor, down_DI: Tensor, router_NI: Tensor) -> tuple[Tensor, Tensor]:
    """x S^T and :func:`~malora_dist.methods.routing.router_logits` of the same x, for any number of adapters stacked.

    Returns:
        z [T, D] in x's dtype, and the logits [T, N] in float32 (or wider).
    """
    wide = torch.promote_types(x_TI.dtype, torch.float32)
    return _Project.apply(x_TI, down_DI, router_NI.to(wide))
