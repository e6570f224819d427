"""The router, on one process: logits, top-k, and the load-balancing loss.

Shape suffixes: see base.py.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from malora_dist.methods.base import Method


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
    """Softmax over all experts in the dtype of the logits, cut to the top k (paper equation 4).

    With ``norm_topk_prob`` the kept gates are renormalised for k > 1, as FastMoE's gate does. At k = 1 they never
    are: the gate would be 1 and the router would get no gradient.
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


def load_balancing_loss(method: Method, slots_N: Tensor, prob_sums_N: Tensor) -> Tensor:
    """aux_loss_coeff * N * sum_e f_e p_e over one microbatch. [], or [...] of several adapters.

    f_e is the share of the tokens' k slots that went to e, p_e the mean router probability. Both
    are means over all non-padding tokens of the microbatch, so the sums have to be complete: the
    product of averages is not the average of products.

    Args:
        slots_N, prob_sums_N: see :func:`routing_sums`, [..., N]; only the latter carries a gradient.
    """
    slots = slots_N.sum(dim=-1, keepdim=True).clamp(min=1.0)
    fraction_N = slots_N / slots
    mean_probs_N = prob_sums_N * (method.settings.topk / slots)
    return method.settings.aux_loss_coeff * method.num_experts * (fraction_N * mean_probs_N).sum(dim=-1)


def mutual_information(slots_JN: Tensor) -> Tensor:
    """How far routing tells tasks apart: I(task; expert) in bits, each task taken as often as any other. []

    sum over tasks j and experts e of 1/J q_je log2(q_je / mean_j q_je), q_je the share of task j's slots that went to
    e: 0 where all tasks are routed alike, at most log2 of the smaller number of tasks and experts. Tasks without a
    slot are left out.

    Args:
        slots_JN: top-k slots that went to each expert, [..., J, N]; then the result is [...].
    """
    slots_J1 = slots_JN.double().sum(dim=-1, keepdim=True)
    shares_JN = slots_JN / slots_J1.clamp(min=1)
    counted_J1 = slots_J1 > 0
    tasks = counted_J1.sum(dim=-2, keepdim=True).clamp(min=1)
    mean_1N = shares_JN.sum(dim=-2, keepdim=True) / tasks
    ratio_JN = torch.where(shares_JN > 0, shares_JN / mean_1N, 1.0)
    return (shares_JN * ratio_JN.log2() / tasks).sum(dim=(-1, -2))


#: An expert is starved below this part of an even load.
STARVED_LOAD = 0.05


def max_over_mean(load_N: Tensor) -> float:
    """Load of the busiest expert over the mean load: 1 is even, N is all on one expert."""
    return float(load_N.max() / load_N.mean()) if load_N.any() else 1.0


def variation(load_N: Tensor) -> float:
    """Coefficient of variation, the loads' standard deviation over their mean: 0 is even, sqrt(N - 1) all on one."""
    return float(load_N.std(correction=0) / load_N.mean()) if load_N.any() else 0.0


def effective_share(load_N: Tensor) -> float:
    """exp(H) / N with the entropy H of the load's distribution: 1 is even, 1 / N all on one expert."""
    if not load_N.any():
        return 1.0
    share_N = load_N / load_N.sum()
    return math.exp(-float(torch.xlogy(share_N, share_N).sum())) / len(load_N)
