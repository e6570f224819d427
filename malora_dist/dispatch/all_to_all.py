"""Tokens travel to the ranks of their experts, one row per (token, rank).

A token whose experts live on the same rank is sent there once, with the gates of that rank's
experts beside it; the rank returns their gate-weighted sum. A row out is Z + E numbers wide
(Z = shared_dim for MALoRA: S_A x travels, never x), a row back M. Shape suffixes as in base.py,
and: R ranks of the expert-parallel group, S rows sent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from malora_dist.adapters.maths import Routing, dense_gates
from malora_dist.dispatch.base import DispatchedTokens
from malora_dist.parallel.collectives import all_to_all_rows, exchange_counts


@dataclass(frozen=True)
class _Handle:
    token_of_row_S: Tensor
    num_tokens: int
    send_counts: tuple[int, ...]
    receive_counts: tuple[int, ...]


class AllToAllDispatcher:
    """Dispatch by two uneven all-to-alls over the expert-parallel group.

    Expert e lives on rank e // (N / R) of the group. The row counts are read on the host: one
    synchronisation per adapted projection.
    """

    name = "all_to_all"

    def __init__(self, num_experts: int, group: ProcessGroup) -> None:
        self._group = group
        self._ranks = group.size()
        self._experts_per_rank = num_experts // self._ranks

    def dispatch(self, z_TZ: Tensor, routing: Routing) -> DispatchedTokens:
        num_tokens = z_TZ.shape[0]
        rank_TK = routing.experts_TK // self._experts_per_rank
        wanted_TR = torch.zeros(num_tokens, self._ranks, dtype=torch.bool, device=z_TZ.device).scatter_(
            1, rank_TK, True
        )
        rank_of_row_S, token_of_row_S = wanted_TR.t().nonzero(as_tuple=True)  # by rank, then by token
        send_R = wanted_TR.sum(dim=0)
        receive_R = exchange_counts(send_R, self._group)
        handle = _Handle(token_of_row_S, num_tokens, tuple(send_R.tolist()), tuple(receive_R.tolist()))

        gates_TRE = dense_gates(routing).view(num_tokens, self._ranks, self._experts_per_rank)
        # Gates travel in z's dtype beside z: they multiply a tensor of that dtype on either side.
        payload = torch.cat((z_TZ[token_of_row_S], gates_TRE[token_of_row_S, rank_of_row_S].to(z_TZ.dtype)), dim=-1)
        received = all_to_all_rows(payload, handle.send_counts, handle.receive_counts, self._group)
        rows_WZ, gates_WE = received.split((z_TZ.shape[-1], self._experts_per_rank), dim=-1)
        return DispatchedTokens(rows_WZ, gates_WE, handle)

    def combine(self, y_WM: Tensor, tokens: DispatchedTokens) -> Tensor:
        handle: _Handle = tokens.handle
        returned_SM = all_to_all_rows(y_WM, handle.receive_counts, handle.send_counts, self._group)
        y_TM = returned_SM.new_zeros(handle.num_tokens, returned_SM.shape[-1])
        return y_TM.index_add(0, handle.token_of_row_S, returned_SM)
