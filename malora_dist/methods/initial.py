"""The start of one parameter of one adapter: the right generator for the declaration's start function."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from malora_dist.methods.base import Method
from malora_dist.methods.start import Draw, keyed_generator


def initial_parameter(
    method: Method,
    name: str,
    in_features: int,
    out_features: int,
    seed: int,
    layer_number: int,
    adapter: str,
    experts: Sequence[int] | None = None,
) -> Tensor:
    """Start value of one parameter, float32 on the CPU, full width.

    What starts at the norms of the base weight is 1 until that is there.

    Args:
        layer_number: 0-based number of the layer in the whole model, not in a pipeline stage.
        adapter: its name (``AdapterSpec.adapters``).
        experts: expert numbers to draw, for the parameters that have an expert axis; None: all.
    """
    param = method.parameters[name]
    widths = method.widths(in_features, out_features)
    shape = tuple(widths[axis] for axis in param.axes if axis != "expert")
    if param.from_norms:
        return torch.ones(shape)

    def start(*expert: int) -> Tensor:
        generator = keyed_generator(seed, f"layers.{layer_number}", adapter, name, *expert)
        return param.start(Draw(method.settings, widths, shape, generator))

    if not param.is_expert:
        return start()
    chosen = range(method.num_experts) if experts is None else experts
    if param.same_for_all:
        return start().expand(len(chosen), *shape).contiguous()
    return torch.stack([start(expert) for expert in chosen])
