"""One adapted projection on one process, straight from the declaration: the oracle of every other path.

Written to be read, not to be fast: every expert sees every token, and gates that are zero leave out what the
router did not choose. Shape suffixes: see base.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from malora_dist.methods.base import Method
from malora_dist.methods.routing import dense_gates, load_balancing_loss, route, router_logits, routing_sums


def adapted_forward(
    method: Method,
    params: Mapping[str, Tensor],
    x_TI: Tensor,
    weight_OI: Tensor,
    valid_T: Tensor | None = None,
    dropped_x_TI: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(Output of the adapted projection [T, O], load-balancing loss []).

    Args:
        params: shaped as :meth:`Method.shape`.
        weight_OI: the frozen base weight W0.
        valid_T: False on padding, which the load-balancing loss leaves out; None means all valid.
        dropped_x_TI: x after `lora_dropout`; None means no dropout.
    """
    p = {name: value.to(x_TI.dtype) for name, value in params.items()}
    z_TD = method.project(p, x_TI if dropped_x_TI is None else dropped_x_TI)
    if method.is_mixture():
        routing = route(router_logits(x_TI, params["router"]), method.settings.topk, method.settings.norm_topk_prob)
        v = sum_over_experts(method, p, z_TD, dense_gates(routing.gates_TK, routing.experts_TK, method.num_experts))
        aux_loss = load_balancing_loss(method, *routing_sums(routing, valid_T))
    else:
        v = method.expert(p, z_TD)
        aux_loss = x_TI.new_zeros((), dtype=torch.float32)
    y_TO = x_TI @ weight_OI.t() + method.scaling * method.combine(p, v)
    with torch.no_grad():
        squared_norms_O = method.squared_norms(params, weight_OI)
    return method.output(params, y_TO, squared_norms_O), aux_loss


def sum_over_experts(method: Method, p: Mapping[str, Tensor], z_TD: Tensor, gates_TE: Tensor) -> Tensor:
    """sum_t g_t expert(p_t, z) over the experts at hand. [T, O], or as wide as ``Method.returned`` says

    With no rows at all every parameter still gets a (zero) gradient.

    Args:
        p: parameters in z's dtype; those with an expert axis hold the experts at hand.
        gates_TE: zero for experts not chosen.
    """
    gates_TE = gates_TE.to(z_TD.dtype)
    total: Tensor | None = None
    for expert in range(gates_TE.shape[1]):
        own = {name: p[name][expert] if param.is_expert else p[name] for name, param in method.parameters.items()}
        part = gates_TE[:, expert, None] * method.expert(own, z_TD)
        total = part if total is None else total + part
    assert total is not None, "a mixture has experts"
    return total
