"""Jobs of tests/test_elementwise.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from malora_dist.parallel.device import without_expected_warnings

Results = dict[str, tuple[list[Tensor], list[Tensor], int]]


def _results(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[list[Tensor], int]:
    """([output, gradient of x], numbers that autograd keeps)."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    x = x.detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = function(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).cos().view_as(y)
    (y * weights).sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad], sum(kept.values())


def against_megatron(dtype: torch.dtype) -> Results:
    """By function: (ours, megatron's and torch's own, numbers that ours keeps for backward)."""
    with without_expected_warnings():
        from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

        from malora_dist.layers.elementwise import _RMSNorm, _SwiGLU, rotate
    generator = torch.Generator().manual_seed(0)
    x_G = torch.randn(5, 2, 24, generator=generator, dtype=dtype)
    x_SBHD = torch.randn(5, 2, 3, 24, generator=generator, dtype=dtype)[..., :8]  # a view, as after the split of qkv
    angles = torch.randn(5, 1, 1, 4, generator=generator).repeat(1, 1, 1, 2)
    weight_H = torch.rand(24, generator=generator, dtype=dtype)
    pairs: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Tensor]] = {
        "rms_norm": (
            lambda x: _RMSNorm.apply(x, weight_H, 1e-5),
            lambda x: F.rms_norm(x, (24,), weight_H, 1e-5),
            x_G,
        ),
        "swiglu": (_SwiGLU.apply, lambda x: F.silu(x[..., :12]) * x[..., 12:], x_G),
        "rotate": (lambda x: rotate(angles, x)[0], lambda x: _apply_rotary_pos_emb_bshd(x, angles), x_SBHD),
    }
    results: Results = {}
    for name, (ours, reference, x) in pairs.items():
        found, kept = _results(ours, x)
        results[name] = found, _results(reference, x)[0], kept
    return results
