"""All experts on this rank: no token moves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from malora_dist.config import Config
from malora_dist.errors import ConfigError
from malora_dist.exchange.base import Dispatched, Exchange, Returning, Site, register
from malora_dist.kernels.experts import Tokens
from malora_dist.methods.routing import Routing


@register("local")
class Local(Exchange):
    """Every token stays where it is; the gates select its experts."""

    moves_tokens = False

    @classmethod
    def check(cls, config: Config) -> None:
        ep = config.expert_model_parallel_size
        if ep > 1:
            rule = f"keeps tokens on their rank, but expert_model_parallel_size={ep}"
            raise ConfigError("dispatch", config.dispatch, rule, "use dispatch=auto")

    @classmethod
    def bytes_sent(cls, site: Site) -> float:
        return 0.0

    def dispatch(self, z: Sequence[Tensor], routings: Sequence[Routing]) -> list[Dispatched]:
        return [
            Dispatched(Tokens(z_TD, routing.gates_TK, routing.experts_TK), handle=None)
            for z_TD, routing in zip(z, routings, strict=True)
        ]

    def send_back(self, rows: Tensor, dispatched: Dispatched) -> Returning:
        return lambda: (rows, torch.arange(rows.shape[0], device=rows.device))
