"""The maths of the adapters on plain tensors: the reference every parallel path is tested against.

Two functions stand around the dispatch of tokens to experts: :func:`project` before it
(replicated parameters: the shared down-projection and the router) and :func:`expert_forward`
after it (the experts at hand). :func:`adapter_forward` is both on one process.

Shape suffixes: T tokens, I input width n, M output width m, D shared width d, N experts,
E experts at hand, K topk, R rank of one expert, W rows that reached the experts at hand,
Z width of z (d for MALoRA, n for MoLoRA, r for LoRA).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from malora_dist.methods.spec import AdapterSpec


class Routing(NamedTuple):
    """Where each token goes. Gates and probabilities are float32 (or wider) and carry gradients."""

    gates_TK: Tensor
    experts_TK: Tensor  # int64
    probs_TN: Tensor


def router_logits(x_TI: Tensor, router_NI: Tensor) -> Tensor:
    """Logits of the bias-free linear router, in float32 (or wider) whatever the dtype of x. [T, N]"""
    dtype = torch.promote_types(x_TI.dtype, torch.float32)
    return F.linear(x_TI.to(dtype), router_NI.to(dtype))


def route(logits_TN: Tensor, topk: int, norm_topk_prob: bool) -> Routing:
    """Softmax over all experts in the dtype of the logits, cut to the top k, renormalised over the kept for k > 1.

    At k = 1 the gate is never renormalised: it would be 1 and the router would get no gradient.
    """
    probs_TN = logits_TN.softmax(dim=-1)
    gates_TK, experts_TK = probs_TN.topk(topk, dim=-1)
    if norm_topk_prob and topk > 1:
        gates_TK = gates_TK / gates_TK.sum(dim=-1, keepdim=True)
    return Routing(gates_TK, experts_TK, probs_TN)


def dense_gates(gates_TK: Tensor, experts_TK: Tensor, num_experts: int) -> Tensor:
    """The gates as a [T, N] matrix, zero for experts not chosen."""
    zeros_TN = gates_TK.new_zeros(*gates_TK.shape[:-1], num_experts)
    return zeros_TN.scatter(-1, experts_TK, gates_TK)


def project(spec: AdapterSpec, params: Mapping[str, Tensor], x_TI: Tensor) -> Tensor:
    """What is sent to the experts: S_A x for MALoRA, A x for LoRA, x itself for MoLoRA. [T, Z]

    Computed in x's dtype; `x_TI` is the input after `lora_dropout`.
    """
    if spec.method == "molora":
        return x_TI
    shared = params["S" if spec.method == "malora" else "A"]
    return F.linear(x_TI, shared.to(x_TI.dtype))


def expert_down(spec: AdapterSpec, params: Mapping[str, Tensor], z_WZ: Tensor, gates_WE: Tensor | None) -> Tensor:
    """What enters B: the gated, scaled r'-wide outputs of the experts at hand, side by side. [W, E * R]

    ``u = (P_cat z) * repeat(s g, r')``: gates are zero for experts not chosen, so no row is sorted or
    moved. For LoRA u is s z.

    Args:
        params: ``P`` [E, R, D] (MALoRA) or ``A`` [E, R, I] (MoLoRA); LoRA needs none.
        gates_WE: gates of the experts at hand; None for the methods without a router.
    """
    if not spec.is_mixture:
        return z_WZ * spec.scaling
    assert gates_WE is not None, "a mixture needs gates"
    down_ERZ = params["P" if spec.method == "malora" else "A"].to(z_WZ.dtype)
    num_experts, rank, _ = down_ERZ.shape
    u_WER = F.linear(z_WZ, down_ERZ.flatten(0, 1)).view(-1, num_experts, rank)
    return (u_WER * (gates_WE * spec.scaling).to(z_WZ.dtype).unsqueeze(-1)).flatten(1)


def expert_up(up: Tensor, u_WU: Tensor) -> Tensor:
    """``y = B_cat u``: the sum over the experts at hand. [W, M]

    Args:
        up: B [E, M, R], or [M, R] for LoRA.
    """
    up_MU = up if up.dim() == 2 else up.permute(1, 0, 2).flatten(1)
    return F.linear(u_WU, up_MU.to(u_WU.dtype))


def expert_forward(spec: AdapterSpec, params: Mapping[str, Tensor], z_WZ: Tensor, gates_WE: Tensor | None) -> Tensor:
    """Gate-weighted sum of the experts at hand, times the scaling s: the gated block form. [W, M]

    Rows without any expert at hand give zero, and with no rows at all every parameter still gets
    a (zero) gradient. For the arguments see :func:`expert_down` and :func:`expert_up`.
    """
    return expert_up(params["B"], expert_down(spec, params, z_WZ, gates_WE))


def routing_sums(routing: Routing, valid_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(top-k slots that went to each expert [N], sum of router probabilities [N]) over the valid tokens.

    Args:
        valid_T: False on padding; None: all tokens are valid.
    """
    probs_TN = routing.probs_TN
    weights_T = torch.ones_like(probs_TN[:, 0]) if valid_T is None else valid_T.to(probs_TN.dtype)
    topk = routing.experts_TK.shape[-1]
    slots_N = probs_TN.new_zeros(probs_TN.shape[-1])
    slots_N.index_add_(0, routing.experts_TK.reshape(-1), weights_T.repeat_interleave(topk))
    return slots_N, weights_T @ probs_TN


def load_balancing_loss(spec: AdapterSpec, slots_N: Tensor, prob_sums_N: Tensor) -> Tensor:
    """aux_loss_coeff * N * sum_e f_e p_e over one microbatch. [], or [...] of several adapters.

    f_e is the share of the tokens' k slots that went to e, p_e the mean router probability. Both
    are means over all non-padding tokens of the microbatch, so the sums have to be complete: the
    product of averages is not the average of products.

    Args:
        slots_N, prob_sums_N: see :func:`routing_sums`, [..., N]; only the latter carries a gradient.
    """
    slots = slots_N.sum(dim=-1, keepdim=True).clamp(min=1.0)
    fraction_N = slots_N / slots
    mean_probs_N = prob_sums_N * (spec.topk / slots)
    return spec.aux_loss_coeff * spec.num_experts * (fraction_N * mean_probs_N).sum(dim=-1)


def adapter_forward(
    spec: AdapterSpec,
    params: Mapping[str, Tensor],
    x_TI: Tensor,
    valid_T: Tensor | None = None,
    dropped_x_TI: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One whole adapter on one process: (delta of the output [T, M], load-balancing loss []).

    Args:
        valid_T: False on padding, which the load-balancing loss leaves out; None means all valid.
        dropped_x_TI: x after `lora_dropout`; None means no dropout.
    """
    z_TZ = project(spec, params, x_TI if dropped_x_TI is None else dropped_x_TI)
    if not spec.is_mixture:
        return expert_forward(spec, params, z_TZ, None), x_TI.new_zeros((), dtype=torch.float32)
    routing = route(router_logits(x_TI, params["router"]), spec.topk, spec.norm_topk_prob)
    gates_TN = dense_gates(routing.gates_TK, routing.experts_TK, spec.num_experts)
    y_TM = expert_forward(spec, params, z_TZ, gates_TN)
    return y_TM, load_balancing_loss(spec, *routing_sums(routing, valid_T))
