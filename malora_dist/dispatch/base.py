"""The protocol of a token dispatcher.

Shape suffixes: T tokens of this rank, Z width of what is sent, M output width, W rows that reached
this rank, E experts of this rank, N experts in all, K topk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from torch.distributed import ProcessGroup

from malora_dist.adapters.maths import Routing


@dataclass(frozen=True)
class DispatchedTokens:
    """What reached this rank's experts.

    Attributes:
        rows_WZ: the projected tokens, z's dtype. May have no rows.
        gates_WE: gates of this rank's experts for each row, zero where the expert was not chosen.
        handle: what the dispatcher needs to send the results back; opaque to everybody else.
    """

    rows_WZ: Tensor
    gates_WE: Tensor
    handle: Any


class TokenDispatcher(Protocol):
    """Sends projected tokens to their experts and brings the gate-weighted results back.

    Every rank of the expert-parallel group calls both functions in the same order, also with no
    token of its own, forward and backward.
    """

    name: str

    def dispatch(self, z_TZ: Tensor, routing: Routing) -> DispatchedTokens:
        """Send each token to the ranks that hold its experts."""
        ...

    def combine(self, y_WM: Tensor, tokens: DispatchedTokens) -> Tensor:
        """Bring the experts' results back in the order of the tokens: their gate-weighted sum. [T, M]"""
        ...


class ShardedRowsDispatcher(TokenDispatcher, Protocol):
    """A dispatcher that can also change, between :meth:`dispatch` and :meth:`combine`, which tokens it works on.

    The tensor-parallel ranks of one expert have either their own sequence shard's tokens or all of
    them. MoLoRA's x is sent in the one form and the experts' outputs are wanted in the other; in
    between only their r-wide inner values cross TP. Shape suffix: U width of those values.
    """

    def gather(
        self, u_WU: Tensor, tokens: DispatchedTokens, experts_TK: Tensor, tp_group: ProcessGroup
    ) -> tuple[Tensor, DispatchedTokens]:
        """From the tokens of the sequence shard to all tokens; `experts_TK` are those of all tokens."""
        ...

    def reduce_scatter(
        self, u_WU: Tensor, tokens: DispatchedTokens, experts_TK: Tensor, tp_group: ProcessGroup
    ) -> tuple[Tensor, DispatchedTokens]:
        """From partial sums over all tokens to whole sums over those of the sequence shard; the inverse."""
        ...
