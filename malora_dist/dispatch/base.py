"""The protocol of a token dispatcher.

Shape suffixes: T tokens of this rank, Z width of what is sent, M output width, W rows that reached
this rank, E experts of this rank, N experts in all, K topk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

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
