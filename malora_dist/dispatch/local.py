"""All experts on this rank: nothing moves. Shape suffixes as in base.py."""

from __future__ import annotations

from torch import Tensor

from malora_dist.adapters.maths import Routing, dense_gates
from malora_dist.dispatch.base import DispatchedTokens


class LocalDispatcher:
    """Every token stays where it is; the gates select its experts."""

    name = "local"

    def dispatch(self, z_TZ: Tensor, routing: Routing) -> DispatchedTokens:
        return DispatchedTokens(z_TZ, dense_gates(routing), handle=None)

    def combine(self, y_WM: Tensor, tokens: DispatchedTokens) -> Tensor:
        return y_WM
