"""Rows sorted by expert, and one GEMM per expert on them.

``torch.nn.functional.grouped_mm`` where it can, a loop over the experts with the same result elsewhere.
Shape suffixes: see methods/base.py; "slot" is one (token, kept expert).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sorted_slots(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(token of each slot, its number in [T, K] order, end of each expert's slots [E] int32), on the device."""
    expert_of_slot, order = experts_TK.flatten().sort(stable=True)
    numbers_E = torch.arange(num_experts, device=experts_TK.device)
    ends_E = torch.searchsorted(expert_of_slot, numbers_E, right=True, out_int32=True)
    return order.div(experts_TK.shape[1], rounding_mode="floor"), order, ends_E


def padded_to(width: int, dtype: torch.dtype) -> int:
    """How many columns are missing to rows of a multiple of 16 bytes, which grouped_mm asks for."""
    return -width % (16 // dtype.itemsize)


def pad_last(tensor: Tensor, more: int) -> Tensor:
    """Zeros behind the last axis; as F.pad, which would write the largest tensor here twice."""
    if not more:
        return tensor
    padded = tensor.new_empty(*tensor.shape[:-1], tensor.shape[-1] + more)
    padded[..., :-more] = tensor
    padded[..., -more:] = 0
    return padded


def _can_group(dtype: torch.dtype, rows: int, *widths: int) -> bool:
    """Whether grouped_mm takes these: 16-bit or float32, no empty side, rows a multiple of 16 bytes long."""
    aligned = all(width > 0 and padded_to(width, dtype) == 0 for width in widths)
    return dtype in (torch.float32, torch.bfloat16, torch.float16) and rows > 0 and aligned


def grouped_mm(rows: Tensor, matrices: Tensor, ends_E: Tensor) -> Tensor:
    """Each expert's rows times its matrix. rows [slots, a], matrices [E, a, c] -> [slots, c]"""
    if _can_group(rows.dtype, *rows.shape, matrices.shape[-1]):
        return F.grouped_mm(rows, matrices, offs=ends_E)
    parts = rows.split(_counts(ends_E))
    return torch.cat([part @ matrix for part, matrix in zip(parts, matrices, strict=True)])


def grouped_outer(a: Tensor, b: Tensor, ends_E: Tensor) -> Tensor:
    """Each expert's a^T b, zero for an expert without rows. a [slots, x], b [slots, y] -> [E, x, y]"""
    if _can_group(a.dtype, *a.shape, b.shape[1]):
        # Blackwell leaves what was in memory for an expert without rows (github.com/pytorch/pytorch/issues/172439).
        is_idle_E = ends_E.diff(prepend=ends_E.new_zeros(1)) == 0
        return F.grouped_mm(a.t(), b, offs=ends_E).masked_fill_(is_idle_E.view(-1, 1, 1), 0.0)
    counts = _counts(ends_E)
    return torch.stack([left.t() @ right for left, right in zip(a.split(counts), b.split(counts), strict=True)])


def _counts(ends_E: Tensor) -> list[int]:
    """Rows of each expert; read on the host."""
    return ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()
