"""The protocol of a token dispatcher.

Shape suffixes: T tokens of this rank, Z width of what is sent, M output width, W rows that reached
this rank, K topk, J = min(K, E) experts a row may have at hand, E experts of this rank, N experts
in all, S rows that came back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from torch.distributed import ProcessGroup

from malora_dist.methods.maths import Routing

#: Waits for what other ranks send back: (rows [S, M], the token of each row [S]).
Returning = Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class DispatchedTokens:
    """What reached this rank's experts.

    Attributes:
        rows_WZ: the projected tokens, z's dtype. May have no rows.
        gates_WJ: gates of the row's experts at hand, zero for one that was not chosen.
        experts_WJ: which of this rank's experts they are, int64, none twice in a row.
        handle: what the dispatcher needs to send the results back; opaque to everybody else.
    """

    rows_WZ: Tensor
    gates_WJ: Tensor
    experts_WJ: Tensor
    handle: Any


class TokenDispatcher(Protocol):
    """Sends projected tokens to their experts and brings the gate-weighted results back.

    Every rank of the expert-parallel group calls both functions in the same order, also with no
    token of its own, forward and backward.

    Attributes:
        name: as the config key ``dispatch`` calls it.
        moves_tokens: False if every token stays on its rank, which then has all experts at hand:
            nothing has to be sent back.
    """

    name: str
    moves_tokens: bool

    def dispatch(self, z: Sequence[Tensor], routings: Sequence[Routing]) -> list[DispatchedTokens]:
        """Send each token to the ranks that hold its experts; for several adapters at once, z [T, Z] of each."""
        ...

    def send_back(self, y_WM: Tensor, tokens: DispatchedTokens) -> Returning:
        """Start bringing the experts' results to their tokens, whose sums over the rows are gate-weighted."""
        ...


class ShardedRowsDispatcher(TokenDispatcher, Protocol):
    """A dispatcher that can also change, between its two functions, which tokens it works on.

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
