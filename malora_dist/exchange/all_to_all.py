"""Tokens travel to the ranks of their experts, one row per (token, rank).

A token whose experts live on the same rank is sent there once, with the gates of that rank's
experts beside it; the rank returns their gate-weighted sum. A row out is Z + E numbers wide
(Z = shared_dim for MALoRA: S_A x travels, never x), a row back M. Shape suffixes as in base.py,
and: R ranks of the expert-parallel group, A adapters of one linear, Q tensor-parallel ranks
(sequence shards), S rows sent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from malora_dist.exchange.base import DispatchedTokens, Returning
from malora_dist.methods.maths import Routing, dense_gates
from malora_dist.parallel.collectives import (
    exchange_counts,
    gather_rows,
    reduce_scatter_rows,
    start_all_to_all_rows,
)


@dataclass(frozen=True)
class _Handle:
    token_of_row_S: Tensor
    num_tokens: int
    topk: int
    send_counts: list[int]
    receive_counts: list[int]


class AllToAllDispatcher:
    """Dispatch by two uneven all-to-alls over the expert-parallel group.

    Expert e lives on rank e // (N / R) of the group. The row counts are read on the host: one
    synchronisation per adapted linear (under TP, MoLoRA adds one per adapter).
    """

    name = "all_to_all"
    moves_tokens = True

    def __init__(self, num_experts: int, group: ProcessGroup) -> None:
        self._group = group
        self._ranks = group.size()
        self._experts_per_rank = num_experts // self._ranks

    def dispatch(self, z: Sequence[Tensor], routings: Sequence[Routing]) -> list[DispatchedTokens]:
        wanted = [self._wanted(routing.experts_TK) for routing in routings]
        send_RA = torch.stack([wanted_TR.sum(dim=0) for wanted_TR in wanted], dim=1)
        receive_RA = exchange_counts(send_RA, self._group)
        send, receive = torch.stack((send_RA, receive_RA)).transpose(1, 2).tolist()
        under_way = [self._start(*each) for each in zip(z, routings, wanted, send, receive, strict=True)]
        return [self._arrived(*each) for each in under_way]

    def _start(
        self, z_TZ: Tensor, routing: Routing, wanted_TR: Tensor, send: list[int], receive: list[int]
    ) -> tuple[Callable[[], Tensor], _Handle]:
        num_tokens = z_TZ.shape[0]
        rank_of_row_S, token_of_row_S = _rows(wanted_TR, sum(send))
        gates_TN = dense_gates(routing.gates_TK, routing.experts_TK, self._ranks * self._experts_per_rank)
        gates_TRE = gates_TN.view(num_tokens, self._ranks, self._experts_per_rank)
        # Gates travel in z's dtype beside z: they multiply a tensor of that dtype on either side.
        payload = torch.cat((z_TZ[token_of_row_S], gates_TRE[token_of_row_S, rank_of_row_S].to(z_TZ.dtype)), dim=-1)
        topk = min(routing.experts_TK.shape[1], self._experts_per_rank)
        handle = _Handle(token_of_row_S, num_tokens, topk, send, receive)
        return start_all_to_all_rows(payload, send, receive, self._group), handle

    def _arrived(self, wait: Callable[[], Tensor], handle: _Handle) -> DispatchedTokens:
        received = wait()
        rows_WZ, gates_WE = received.split((received.shape[1] - self._experts_per_rank, self._experts_per_rank), dim=-1)
        gates_WJ, experts_WJ = gates_WE.topk(handle.topk, dim=-1)
        return DispatchedTokens(rows_WZ, gates_WJ, experts_WJ, handle)

    def send_back(self, y_WM: Tensor, tokens: DispatchedTokens) -> Returning:
        handle: _Handle = tokens.handle
        wait = start_all_to_all_rows(y_WM, handle.receive_counts, handle.send_counts, self._group)
        return lambda: (wait(), handle.token_of_row_S)

    def gather(
        self, u_WU: Tensor, tokens: DispatchedTokens, experts_TK: Tensor, tp_group: ProcessGroup
    ) -> tuple[Tensor, DispatchedTokens]:
        """Rows come by (rank, token of the shard), and leave by (rank, token of all shards)."""
        wanted_TR = self._wanted(experts_TK)
        sent_RQ, received_RQ = self._rows_by_shard(wanted_TR, tp_group.size())
        by_shard = gather_rows(u_WU, received_RQ.sum(dim=0).tolist(), tp_group)
        order = _transposed_blocks(received_RQ.t())
        send = sent_RQ.sum(dim=1).tolist()
        handle = _Handle(
            _rows(wanted_TR, sum(send))[1],
            wanted_TR.shape[0],
            tokens.handle.topk,
            send,
            received_RQ.sum(dim=1).tolist(),
        )
        return by_shard[order.to(u_WU.device)], replace(tokens, handle=handle)

    def reduce_scatter(
        self, u_WU: Tensor, tokens: DispatchedTokens, experts_TK: Tensor, tp_group: ProcessGroup
    ) -> tuple[Tensor, DispatchedTokens]:
        """Rows come by (rank, token of all shards), and leave by (rank, token of the shard)."""
        wanted_TR = self._wanted(experts_TK)
        sent_RQ, received_RQ = self._rows_by_shard(wanted_TR, tp_group.size())
        order = _transposed_blocks(received_RQ)
        u_shard = reduce_scatter_rows(u_WU[order.to(u_WU.device)], received_RQ.sum(dim=0).tolist(), tp_group)
        shard = tp_group.rank()
        own_TR = wanted_TR.chunk(tp_group.size())[shard]
        send = sent_RQ[:, shard].tolist()
        handle = _Handle(
            _rows(own_TR, sum(send))[1],
            own_TR.shape[0],
            tokens.handle.topk,
            send,
            received_RQ[:, shard].tolist(),
        )
        return u_shard, replace(tokens, handle=handle)

    def _wanted(self, experts_TK: Tensor) -> Tensor:
        """Which ranks have an expert of which token. bool [T, R]"""
        none_TR = torch.zeros(experts_TK.shape[0], self._ranks, dtype=torch.bool, device=experts_TK.device)
        return none_TR.scatter_(1, experts_TK // self._experts_per_rank, True)

    def _rows_by_shard(self, wanted_TR: Tensor, shards: int) -> tuple[Tensor, Tensor]:
        """Rows that go to, and come from, each rank by sequence shard of the token. Two int64 [R, Q] on the CPU."""
        sent_RQ = wanted_TR.unflatten(0, (shards, -1)).sum(dim=1).t().contiguous()
        return tuple(torch.stack((sent_RQ, exchange_counts(sent_RQ, self._group))).cpu())


def _rows(wanted_TR: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(rank, token) of each row, by rank, then by token. Two int64 [S]

    Args:
        count: S, known on the host; looking for it would wait for the device.
    """
    rank_S, token_S = torch.nonzero_static(wanted_TR.t(), size=count).unbind(dim=1)
    return rank_S, token_S


def _transposed_blocks(sizes_AB: Tensor) -> Tensor:
    """The index that takes rows lying by (a, b) to the order (b, a); block (a, b) has ``sizes_AB[a, b]`` rows."""
    ends_AB = sizes_AB.flatten().cumsum(0).view_as(sizes_AB)
    blocks = zip((ends_AB - sizes_AB).t().flatten().tolist(), ends_AB.t().flatten().tolist(), strict=True)
    return torch.cat([torch.arange(start, end) for start, end in blocks])
