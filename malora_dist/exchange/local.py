"""All experts on this rank: no token moves. Shape suffixes as in base.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from malora_dist.exchange.base import DispatchedTokens, Returning
from malora_dist.methods.maths import Routing
from malora_dist.parallel.collectives import gather_rows, reduce_scatter_rows


class LocalDispatcher:
    """Every token stays where it is; the gates select its experts.

    Args:
        name: ``local``, ``gather_experts`` where the experts come to the tokens (see
            gather_experts.py), or ``none`` for methods with one expert.
    """

    moves_tokens = False

    def __init__(self, name: str = "local") -> None:
        self.name = name

    def dispatch(self, z: Sequence[Tensor], routings: Sequence[Routing]) -> list[DispatchedTokens]:
        return [
            DispatchedTokens(z_TZ, routing.gates_TK, routing.experts_TK, handle=None)
            for z_TZ, routing in zip(z, routings, strict=True)
        ]

    def send_back(self, y_WM: Tensor, tokens: DispatchedTokens) -> Returning:
        return lambda: (y_WM, torch.arange(y_WM.shape[0], device=y_WM.device))

    def gather(
        self, u_WU: Tensor, tokens: DispatchedTokens, experts_TK: Tensor, tp_group: ProcessGroup
    ) -> tuple[Tensor, DispatchedTokens]:
        return gather_rows(u_WU, [u_WU.shape[0]] * tp_group.size(), tp_group), tokens

    def reduce_scatter(
        self, u_WU: Tensor, tokens: DispatchedTokens, experts_TK: Tensor, tp_group: ProcessGroup
    ) -> tuple[Tensor, DispatchedTokens]:
        shard = u_WU.shape[0] // tp_group.size()
        return reduce_scatter_rows(u_WU, [shard] * tp_group.size(), tp_group), tokens
