"""Tokens travel to the ranks of their experts, one row per (token, rank).

A token whose experts live on the same rank is sent there once, with the gates of that rank's
experts beside it; the rank returns their gate-weighted sum. A row out is D + E numbers wide
(D = shared_dim for MALoRA: S_A x travels, never x), a row back as wide as the experts' outputs.
Shape suffixes: see malora_dist/methods/base.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from malora_dist.exchange.base import Dispatched, Exchange, Returning, Site, register
from malora_dist.kernels.experts import Tokens
from malora_dist.methods.routing import Routing, dense_gates
from malora_dist.parallel.collectives import exchange_counts, start_all_to_all_rows


@dataclass(frozen=True)
class _Handle:
    token_of_row: Tensor
    topk: int
    send_counts: list[int]
    receive_counts: list[int]


def expected_ranks(num_experts: int, topk: int, ep: int) -> float:
    """Ranks that hold at least one of a token's experts, on average over uniform routing; at most min(k, EP)."""
    elsewhere = math.comb(num_experts - num_experts // ep, topk) / math.comb(num_experts, topk)
    return ep * (1 - elsewhere)


@register("all_to_all")
class AllToAll(Exchange):
    """Two uneven all-to-alls over the expert-parallel group.

    The row counts are read on the host: one synchronisation per adapted linear.
    """

    is_automatic = True

    @classmethod
    def bytes_sent(cls, site: Site) -> float:
        """One row per (token, rank) out, one back, and their gradients.

        With R = expected_ranks: 2 T R (EP - 1) / EP (D + N / EP + width of a result) numbers.
        """
        ep, method = site.expert_parallel, site.method
        rows = site.tokens_here * expected_ranks(method.num_experts, method.settings.topk, ep) * (ep - 1) / ep
        return 2 * rows * (site.sent_width + method.num_experts // ep + site.returned_width) * site.itemsize

    def dispatch(self, z: Sequence[Tensor], routings: Sequence[Routing]) -> list[Dispatched]:
        wanted = [self._wanted(routing.experts_TK) for routing in routings]
        to_send = torch.stack([wanted_ranks.sum(dim=0) for wanted_ranks in wanted], dim=1)  # [ranks, adapters]
        to_receive = exchange_counts(to_send, self._group)
        send, receive = torch.stack((to_send, to_receive)).transpose(1, 2).tolist()
        under_way = [self._start(*each) for each in zip(z, routings, wanted, send, receive, strict=True)]
        return [self._arrived(*each) for each in under_way]

    def _wanted(self, experts_TK: Tensor) -> Tensor:
        """Which ranks have an expert of which token. bool [T, ranks]"""
        none = torch.zeros(experts_TK.shape[0], self._ranks, dtype=torch.bool, device=experts_TK.device)
        return none.scatter_(1, experts_TK // self._experts_per_rank, True)

    def _start(
        self, z_TD: Tensor, routing: Routing, wanted_ranks: Tensor, send: list[int], receive: list[int]
    ) -> tuple[Callable[[], Tensor], _Handle]:
        # By rank, then by token. The number of rows is known on the host; looking for it would wait for the device.
        rank_of_row, token_of_row = torch.nonzero_static(wanted_ranks.t(), size=sum(send)).unbind(dim=1)
        gates_TN = dense_gates(routing.gates_TK, routing.experts_TK, self._ranks * self._experts_per_rank)
        gates_by_rank = gates_TN.view(-1, self._ranks, self._experts_per_rank)
        # Gates travel in z's dtype beside z: they multiply a tensor of that dtype on either side.
        payload = torch.cat((z_TD[token_of_row], gates_by_rank[token_of_row, rank_of_row].to(z_TD.dtype)), dim=-1)
        topk = min(routing.experts_TK.shape[1], self._experts_per_rank)
        return start_all_to_all_rows(payload, send, receive, self._group), _Handle(token_of_row, topk, send, receive)

    def _arrived(self, wait: Callable[[], Tensor], handle: _Handle) -> Dispatched:
        received = wait()
        z_TD, gates_TE = received.split((received.shape[1] - self._experts_per_rank, self._experts_per_rank), dim=-1)
        gates_TK, experts_TK = gates_TE.topk(handle.topk, dim=-1)
        return Dispatched(Tokens(z_TD, gates_TK, experts_TK), handle)

    def send_back(self, rows: Tensor, dispatched: Dispatched) -> Returning:
        handle: _Handle = dispatched.handle
        wait = start_all_to_all_rows(rows, handle.receive_counts, handle.send_counts, self._group)
        return lambda: (wait(), handle.token_of_row)
