"""The load-balancing loss of a linear's adapters, and what the run records of their routing.

Shape suffixes: see methods/base.py. [adapters, tasks, N] and the like are spelled out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.tensor_parallel.random import is_checkpointing
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from malora_dist.layers.crossing import Crossing
from malora_dist.layers.routing_context import RoutingContext
from malora_dist.methods.base import Method
from malora_dist.methods.routing import Routing, load_balancing_loss


def attach_load_balancing(
    carrier: Tensor, routing: Routing, method: Method, context: RoutingContext, crossing: Crossing, sites: Sequence[str]
) -> Tensor:
    """The carrier with the gradient of this microbatch's load-balancing losses attached; records statistics.

    Called where every token is on one TP rank only. f and p are summed over TP before their product, so
    that no layout changes the loss; the gradient of p stays on the rank that holds the token.

    Args:
        carrier: any tensor on the way to the loss; the router's own, which needs a gradient anyway.
        routing: [T, adapters, ...] of all adapters of the linear.
        sites: names of the adapters.
    """
    wants_loss = torch.is_grad_enabled() and method.settings.aux_loss_coeff > 0
    is_recording = context.recording and not (is_checkpointing() and torch.is_grad_enabled())  # not when recomputed
    if not (wants_loss or is_recording):
        return carrier
    num_tokens, adapters, num_experts = routing.probs_TN.shape
    task_of_token = context.local_tasks(num_tokens, crossing.group.rank(), crossing.size, carrier.device)
    valid_T = (task_of_token > 0).float()
    first_row = torch.arange(adapters, device=carrier.device) * (context.num_tasks + 1)
    row = (first_row + task_of_token.unsqueeze(1)).unsqueeze(-1)  # [T, adapters, 1], of the table below
    slots = (row * num_experts + routing.experts_TK).flatten()
    counts = torch.zeros(adapters * (context.num_tasks + 1) * num_experts, device=carrier.device)
    counts.index_add_(0, slots, torch.ones_like(slots, dtype=torch.float32))
    counts = counts.view(adapters, context.num_tasks + 1, num_experts)

    prob_sums = (valid_T @ routing.probs_TN.flatten(1)).view(adapters, -1)
    sums = crossing.summed(torch.stack((counts[:, 1:].sum(dim=1), prob_sums)))
    losses = load_balancing_loss(method, sums[0].detach(), sums[1])  # [adapters]
    if is_recording:
        entropy_of_token = -torch.xlogy(routing.probs_TN, routing.probs_TN).sum(dim=-1)
        entropies = (valid_T @ entropy_of_token).detach()
        for i, site in enumerate(sites):
            context.record(site, counts[i], entropies[i], losses[i].detach())
    return MoEAuxLossAutoScaler.apply(carrier, losses.sum()) if wants_loss else carrier
