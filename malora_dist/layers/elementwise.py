"""SwiGLU and rotary embedding without the copies that megatron-core's unfused functions make.

megatron's fused versions are compiled at run time or need CUDA extensions; these are a few in-place
torch operations each, the same on every device, and keep less for backward.

Shape suffixes: F width of gate and of up, G = 2 F, S sequence, B batch, H heads, D width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_G: Tensor) -> Tensor:
        ctx.save_for_backward(x_G)
        gate, up = x_G.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, dy_F: Tensor) -> Tensor:
        (x_G,) = ctx.saved_tensors
        gate, up = x_G.chunk(2, dim=-1)
        dx_G = torch.empty_like(x_G)
        d_gate, d_up = dx_G.chunk(2, dim=-1)
        torch.mul(dy_F, F.silu(gate), out=d_up)
        torch.mul(dy_F, up, out=d_gate)
        torch.ops.aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)
        return dx_G


class SwiGLU(MegatronModule):
    """silu(gate) * up of [..., gate | up], as megatron's MLP wants an activation module: built from the config."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        assert config.activation_func is F.silu, "the only activation here"

    def forward(self, x_G: Tensor) -> Tensor:
        """[..., 2 F] -> [..., F]; keeps its input only."""
        return _SwiGLU.apply(x_G)


def _rotated(x_SBHD: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    """x cos + rotate_half(x) sin."""
    y_SBHD = x_SBHD * cos_SD
    (x1, x2), (y1, y2), (sin1, sin2) = (t.chunk(2, dim=-1) for t in (x_SBHD, y_SBHD, sin_SD))
    y1.addcmul_(x2, sin1, value=-1)
    y2.addcmul_(x1, sin2)
    return y_SBHD


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SBHD: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
        ctx.save_for_backward(cos_SD, sin_SD)
        return _rotated(x_SBHD, cos_SD, sin_SD)

    @staticmethod
    def backward(ctx: Any, dy_SBHD: Tensor) -> tuple[Tensor, None, None]:
        cos_SD, sin_SD = ctx.saved_tensors
        return _rotated(dy_SBHD, cos_SD, -sin_SD), None, None  # a rotation's transpose turns back


def rotate(angles_SD: Tensor, *tensors_SBHD: Tensor) -> list[Tensor]:
    """Rotary embedding in halves, as transformers lays them out, in the tensors' dtype.

    Args:
        angles_SD: float32 [S, 1, 1, D], the same in both halves of D.
        tensors_SBHD: queries and keys.
    """
    cos_SD, sin_SD = (t.to(tensors_SBHD[0].dtype) for t in (angles_SD.cos(), angles_SD.sin()))
    return [_Rotate.apply(x_SBHD, cos_SD, sin_SD) for x_SBHD in tensors_SBHD]


class RotaryAttention(SelfAttention):
    """megatron's self-attention, rotated by :func:`rotate`."""

    _angles_SD: Tensor | None = None

    def forward(self, *args: Any, rotary_pos_emb: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As SelfAttention.forward, which is left to believe that there is nothing to rotate."""
        self._angles_SD = rotary_pos_emb
        return super().forward(*args, **kwargs)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Query and key rotated, and the value, each [s, b, heads, head_dim]."""
        query, key, value = super().get_query_key_value_tensors(*args, **kwargs)
        assert self._angles_SD is not None, "positions are rotary"
        query, key = rotate(self._angles_SD, query, key)
        return query, key, value
