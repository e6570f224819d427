"""All experts on this rank: nothing moves. Shape suffixes as in base.py."""

from __future__ import annotations

from torch import Tensor
from torch.distributed import ProcessGroup

from malora_dist.adapters.maths import Routing, dense_gates
from malora_dist.dispatch.base import DispatchedTokens
from malora_dist.parallel.collectives import gather_rows, reduce_scatter_rows


class LocalDispatcher:
    """Every token stays where it is; the gates select its experts."""

    name = "local"

    def dispatch(self, z_TZ: Tensor, routing: Routing) -> DispatchedTokens:
        return DispatchedTokens(z_TZ, dense_gates(routing), handle=None)

    def combine(self, y_WM: Tensor, tokens: DispatchedTokens) -> Tensor:
        return y_WM

    def gather(
        self, u_WU: Tensor, tokens: DispatchedTokens, experts_TK: Tensor, tp_group: ProcessGroup
    ) -> tuple[Tensor, DispatchedTokens]:
        return gather_rows(u_WU, [u_WU.shape[0]] * tp_group.size(), tp_group), tokens

    def reduce_scatter(
        self, u_WU: Tensor, tokens: DispatchedTokens, experts_TK: Tensor, tp_group: ProcessGroup
    ) -> tuple[Tensor, DispatchedTokens]:
        shard = u_WU.shape[0] // tp_group.size()
        return reduce_scatter_rows(u_WU, [shard] * tp_group.size(), tp_group), tokens
