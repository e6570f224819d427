"""DoRA the way PEFT computes it, as a yardstick for step_time.py.

Every forward makes W0 + s B A, as large as the weight, for the norms of its rows, and adds
(g - 1) W0 x + g s B A x to the output of the layer, g = magnitude / norm; every step is a torch operation of its own
whose result autograd keeps. Kinder than PEFT: B A is one product, where PEFT multiplies both with an identity matrix.
A fused linear's projections are joined by one copy that separate linears do not need.

Shape suffixes: see malora_dist/methods/base.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from malora_dist.kernels.columns import Columns
from malora_dist.parallel.device import without_expected_warnings

with without_expected_warnings():  # imports megatron-core
    from malora_dist.layers.linear_adapters import Add, LinearAdapters


def _begin(self: LinearAdapters, x: Tensor, weight_OI: Tensor) -> Add:
    """In place of LinearAdapters.begin."""
    parameters = {
        projection: adapter.parameters_of(projection) for adapter in self._list for projection in adapter.projections
    }

    def add(y: Tensor) -> Tensor:
        parts = []
        for projection, columns in self._columns.items():
            part = columns.of(y)
            if projection in parameters:
                scaling = self._method.scaling
                part = part + _delta(x.flatten(0, 1), part, weight_OI, columns, parameters[projection], scaling)
            parts.append(part)
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)).view_as(y)

    return add


def _delta(
    x_TI: Tensor, base: Tensor, weight_OI: Tensor, columns: Columns, p: Mapping[str, Tensor], scaling: float
) -> Tensor:
    """What is added to one projection's part of the base output; shaped as that part."""
    a_RI, b_OR = p["A"].to(x_TI.dtype), p["B"].to(x_TI.dtype)
    rows = weight_OI.unflatten(0, (columns.blocks, -1))[:, columns.start : columns.start + columns.width]
    norms_O = _norms(rows, (b_OR @ a_RI).detach(), scaling)
    scale = (p["magnitude"] / norms_O).to(x_TI.dtype).view(base.shape[1:])
    lora = F.linear(F.linear(x_TI, a_RI), b_OR).view_as(base)
    return (scale - 1) * base + scale * lora * scaling


def _norms(weight: Tensor, lora_weight_OI: Tensor, scaling: float) -> Tensor:
    """Of the rows of W0 + s B A. [O]"""
    return torch.linalg.norm(weight + scaling * lora_weight_OI.view_as(weight), dim=-1).flatten()


def dora_as_usual(trainer: Any) -> None:
    """From now on the trainer's DoRA is computed in that way."""
    assert trainer.config.method == "dora"
    for module in trainer.trained.model[0].modules():
        if isinstance(module, LinearAdapters):
            module.begin = MethodType(_begin, module)  # type: ignore[method-assign]
