"""RMSNorm, SwiGLU and rotary embedding without the copies that torch's and megatron-core's unfused functions make.

megatron's fused versions are compiled at run time or need CUDA extensions; these are a few in-place
torch operations each, the same on every device, and keep less for backward.

Gate and up lie side by side, [..., 2 ffn]; queries and keys are [s, b, heads, head_dim], angles [s, 1, 1, head_dim].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class _RMSNorm(torch.autograd.Function):
    """x / rms(x) * weight in float32, rounded once; keeps x and a number per token. The weight is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        wide = x.to(dtype)
        squares = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        inverse = squares.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_H, inverse)
        return (wide * inverse).mul_(weight_H).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        x, weight_H, inverse = ctx.saved_tensors
        wide, scaled = x.to(inverse.dtype), dy.to(inverse.dtype) * weight_H
        along_x = torch.linalg.vecdot(scaled, wide).unsqueeze(-1)
        along_x *= inverse.pow(3).div_(x.shape[-1])
        return scaled.mul_(inverse).addcmul_(wide, along_x, value=-1).to(x.dtype), None, None


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm under the constructor megatron's specs call; works on sequence shards as it is."""

    eps: float

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]. CUDA has a kernel of torch's own; elsewhere that is a dozen passes."""
        return super().forward(x) if x.is_cuda else _RMSNorm.apply(x, self.weight, self.eps)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        dx = torch.empty_like(x)
        d_gate, d_up = dx.chunk(2, dim=-1)
        torch.mul(dy, F.silu(gate), out=d_up)
        torch.mul(dy, up, out=d_gate)
        torch.ops.aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)
        return dx


class SwiGLU(MegatronModule):
    """silu(gate) * up of [..., gate | up], as megatron's MLP wants an activation module: built from the config."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        assert config.activation_func is F.silu, "the only activation here"

    def forward(self, x: Tensor) -> Tensor:
        """[..., 2 F] -> [..., F]; keeps its input only."""
        return _SwiGLU.apply(x)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + rotate_half(x) sin."""
    y = x * cos
    (x1, x2), (y1, y2), (sin1, sin2) = (t.chunk(2, dim=-1) for t in (x, y, sin))
    y1.addcmul_(x2, sin1, value=-1)
    y2.addcmul_(x1, sin2)
    return y


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(dy, cos, -sin), None, None  # a rotation's transpose turns back


def rotate(angles: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Rotary embedding in halves, as transformers lays them out, in the tensors' dtype.

    Args:
        angles: float32 [S, 1, 1, D], the same in both halves of D.
        tensors: queries and keys.
    """
    cos, sin = (t.to(tensors[0].dtype) for t in (angles.cos(), angles.sin()))
    return [_Rotate.apply(x, cos, sin) for x in tensors]


class RotaryAttention(SelfAttention):
    """megatron's self-attention, rotated by :func:`rotate`."""

    _angles: Tensor | None = None

    def forward(self, *args: Any, rotary_pos_emb: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As SelfAttention.forward, which is left to believe that there is nothing to rotate."""
        self._angles = rotary_pos_emb
        return super().forward(*args, **kwargs)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Query and key rotated, and the value, each [s, b, heads, head_dim]."""
        query, key, value = super().get_query_key_value_tensors(*args, **kwargs)
        assert self._angles is not None, "positions are rotary"
        query, key = rotate(self._angles, query, key)
        return query, key, value
