"""MoLoRA the way mixture libraries dispatch tokens, as a yardstick for step_time.py.

FastMoE's order of operations: every token's x is copied to a row per expert, sorted by expert (its MOEScatter); the
experts run on their rows, one GEMM each; their outputs, as wide as the layer's, are copied back into token order
(MOEGather), weighted by the gates, and summed. Every step is a torch operation of its own whose result autograd keeps.

Shape suffixes as in malora_dist/kernels/experts.py.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from malora_dist.exchange.base import DispatchedTokens
from malora_dist.kernels.experts import Columns, sorted_slots
from malora_dist.parallel.device import without_expected_warnings

with without_expected_warnings():  # imports megatron-core
    from malora_dist.kernels.fused_columns import Run

    from malora_dist.layers.adapted_linear import LinearAdapters
    from malora_dist.layers.adapter import Adapter


def _compute(
    self: LinearAdapters, adapter: Adapter, y: Tensor, tokens: DispatchedTokens, run: Run, columns: Columns
) -> Tensor:
    """In place of LinearAdapters._compute: y plus the experts' weighted outputs."""
    x_TI, experts_TK = tokens.rows_WZ, tokens.experts_WJ
    down_ERI, up_EMR = adapter.get_parameter("A"), adapter.up(*run.projections)
    token_S, order_S, ends_E = sorted_slots(experts_TK, down_ERI.shape[0])

    x_SI = x_TI[token_S]
    u_SR = F.grouped_mm(x_SI, down_ERI.to(x_TI.dtype).transpose(1, 2), offs=ends_E)
    y_SM = F.grouped_mm(u_SR, up_EMR.to(x_TI.dtype).transpose(1, 2), offs=ends_E)
    in_token_order_SM = torch.empty_like(y_SM).index_copy(0, order_S, y_SM)
    gates_T1K = tokens.gates_WJ.to(x_TI.dtype).unsqueeze(1)
    delta_TM = torch.bmm(gates_T1K, in_token_order_SM.view(*experts_TK.shape, -1)).squeeze(1)
    target = columns.of(y)
    target += (self._spec.scaling * delta_TM).view_as(target)
    return y


def dispatch_as_usual(trainer: Any) -> None:
    """From now on the trainer's MoLoRA experts, all of them on this rank, are computed in that order."""
    assert trainer.config.method == "molora"
    for module in trainer.trained.model[0].modules():
        if isinstance(module, LinearAdapters):
            module._compute = MethodType(_compute, module)  # type: ignore[method-assign]
