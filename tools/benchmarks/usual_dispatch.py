"""MoLoRA the way mixture libraries dispatch tokens, as a yardstick for step_time.py.

FastMoE's order of operations: every token's x is copied to a row per expert, sorted by expert (its MOEScatter); the
experts run on their rows, one GEMM each; their outputs, as wide as the layer's, are copied back into token order
(MOEGather), weighted by the gates, and summed. Every step is a torch operation of its own whose result autograd keeps.

Shape suffixes: see malora_dist/methods/base.py.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from malora_dist.kernels.columns import Columns, Span, stack_rows
from malora_dist.kernels.experts import Tokens
from malora_dist.kernels.grouped import sorted_slots
from malora_dist.parallel.device import without_expected_warnings

with without_expected_warnings():  # imports megatron-core
    from malora_dist.layers.adapter import Adapter
    from malora_dist.layers.linear_adapters import LinearAdapters


def _add_chain(
    self: LinearAdapters, adapter: Adapter, span: Span, y: Tensor, columns: Columns, tokens: Tokens
) -> Tensor:
    """In place of LinearAdapters._add_chain: y plus the experts' weighted outputs."""
    x_TI, gates_TK, experts_TK = tokens
    assert gates_TK is not None, "MoLoRA has a router"
    assert experts_TK is not None, "MoLoRA has a router"
    down_ERI = adapter.get_parameter("A").to(x_TI.dtype)
    ups = [adapter.parameters_of(projection)["B"] for projection in span.projections]
    up_EOR = stack_rows(ups, span.blocks).to(x_TI.dtype)
    token_of_slot, order, ends_E = sorted_slots(experts_TK, down_ERI.shape[0])

    rows = x_TI[token_of_slot]
    inner = F.grouped_mm(rows, down_ERI.transpose(1, 2), offs=ends_E)
    outputs = F.grouped_mm(inner, up_EOR.transpose(1, 2), offs=ends_E)
    in_token_order = torch.empty_like(outputs).index_copy(0, order, outputs)
    gates_T1K = gates_TK.to(x_TI.dtype).unsqueeze(1)
    delta_TO = torch.bmm(gates_T1K, in_token_order.view(*experts_TK.shape, -1)).squeeze(1)
    target = columns.of(y)
    target += (adapter.method.scaling * delta_TO).view_as(target)
    return y


def dispatch_as_usual(trainer: Any) -> None:
    """From now on the trainer's MoLoRA experts, all of them on this rank, are computed in that order."""
    assert trainer.config.method == "molora"
    for module in trainer.trained.model[0].modules():
        if isinstance(module, LinearAdapters):
            module._add_chain = MethodType(_add_chain, module)  # type: ignore[method-assign]
