"""How tokens and experts meet: the interface of an exchange, and the registry of the ways there are.

Experts are sharded over the ranks of the expert-parallel group, on axis 0 of their parameters: expert e lies on rank
e // (N / EP). Tokens lie on the data-parallel ranks. An exchange brings the two together, and owns what that takes:
its checks, its bytes, and its life in an optimizer step. Nobody asks for its name.

Shape suffixes: see malora_dist/methods/base.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from malora_dist.config import Config
from malora_dist.kernels.experts import Tokens
from malora_dist.methods.base import Method, Style
from malora_dist.methods.routing import Routing
from malora_dist.registry import Registry

#: float32, of adapters and their gradients.
PARAMETER_BYTES = 4

#: Waits for what other ranks send back: (rows [.., O], the token of each row).
Returning = Callable[[], tuple[Tensor, Tensor]]


class Dispatched(NamedTuple):
    """What reached this rank's experts.

    Attributes:
        tokens: one row per token, or per (token, rank) or (token, expert) of other ranks; may have none.
        handle: what the exchange needs to send the results back; opaque to everybody else.
    """

    tokens: Tokens
    handle: Any


@dataclass(frozen=True)
class Site:
    """One adapter on one rank, as far as its traffic is concerned.

    Attributes:
        method: with its settings.
        in_features, out_features: full widths n and m (m of all projections, if several share the adapter).
        style: of the base linear, which output (column) or input (row) is sharded over TP.
        tensor_parallel, expert_parallel: TP and EP.
        tokens: of one data-parallel rank in one optimizer step.
        itemsize: bytes of an activation.
    """

    method: Method
    in_features: int
    out_features: int
    style: Style
    tensor_parallel: int
    expert_parallel: int
    tokens: int
    itemsize: int

    @property
    def tokens_here(self) -> float:
        """Tokens that one TP rank dispatches: all for a column, its sequence shard's for a row."""
        return self.tokens if self.style == "column" else self.tokens / self.tensor_parallel

    @property
    def sent_width(self) -> int:
        """Numbers of a token's row on the way out."""
        return self.method.widths(self.in_features, self.out_features)[self.method.sent]

    @property
    def returned_width(self) -> int:
        """Numbers of a row on the way back."""
        width = self.method.widths(self.in_features, self.out_features)[self.method.returned]
        is_sharded = self.style == "column" and self.method.returned == "out"
        return width // self.tensor_parallel if is_sharded else width

    def numbers(self, name: str) -> int:
        """Of all experts together in one parameter, on one TP rank."""
        whole = math.prod(self.method.shape(name, self.in_features, self.out_features))
        is_sharded = self.method.parameters[name].placement(self.style).tp_axis is not None
        return whole // self.tensor_parallel if is_sharded else whole

    @property
    def frozen_bytes(self) -> int:
        """Of the base weight beside the adapter."""
        return self.in_features * self.out_features // self.tensor_parallel * self.itemsize


class Exchange:
    """One way for tokens and experts to meet.

    Every rank of the expert-parallel group calls :meth:`dispatch` and :meth:`send_back` in the same order, also with
    no token of its own, forward and backward.

    Args:
        num_experts: N of every adapter.
        group: the expert-parallel group.
        device: of this rank.

    Attributes:
        moves_tokens: False if every token stays on its rank, which then has all experts at hand:
            nothing has to be sent back.
        is_automatic: `dispatch: auto` considers it for sharded experts.
    """

    name: ClassVar[str]
    moves_tokens: ClassVar[bool] = True
    is_automatic: ClassVar[bool] = False

    def __init__(self, num_experts: int, group: ProcessGroup, device: torch.device) -> None:
        self._group = group
        self._ranks = group.size()
        self._experts_per_rank = num_experts // self._ranks

    # ---- before a run

    @classmethod
    def check(cls, config: Config) -> None:
        """Refuse a configuration that this exchange cannot serve.

        Raises:
            ConfigError: naming key, value, rule and cure.
        """

    @classmethod
    def bytes_sent(cls, site: Site) -> float:
        """By one rank over the expert-parallel group for one adapter in one optimizer step, forward and backward."""
        raise NotImplementedError

    @classmethod
    def bytes_held(cls, site: Site) -> int:
        """Of copies that one rank holds through a step for one adapter, beside its shard."""
        return 0

    def add(self, layer_number: int, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Get to know an adapter's expert shards, float32 [E, ...]; called once for each, when the model is built."""

    # ---- in a step

    def begin_step(self) -> None:
        """Called before the first microbatch of an optimizer step or of an evaluation."""

    def end_step(self, with_gradients: bool) -> None:
        """Called after the last microbatch, and before megatron's own reductions of gradients."""

    def weights(self, parameter: torch.nn.Parameter) -> Tensor:
        """A parameter with the experts that are at hand on this rank."""
        return parameter

    def dispatch(self, z: Sequence[Tensor], routings: Sequence[Routing]) -> list[Dispatched]:
        """Send each token to the ranks that hold its experts; for several adapters at once, z [T, D] of each."""
        raise NotImplementedError

    def send_back(self, rows: Tensor, dispatched: Dispatched) -> Returning:
        """Start bringing the experts' results to their tokens, whose sums over the rows are gate-weighted."""
        raise NotImplementedError


EXCHANGES: Registry[Exchange] = Registry("malora_dist.exchange", key="dispatch")


def register(name: str) -> Callable[[type[Exchange]], type[Exchange]]:
    """Class decorator: make an exchange known under the name that the config key ``dispatch`` uses."""

    def add(cls: type[Exchange]) -> type[Exchange]:
        cls.name = name
        return EXCHANGES.register(name)(cls)

    return add
