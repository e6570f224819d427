"""The experts come to the tokens: every rank gathers all experts' weights once per optimizer step.

Weights, gradients and optimizer state stay sharded over the expert-parallel group; for the length
of one optimizer step each rank has a full copy of every expert parameter beside its shard, and a full
gradient that is summed over the group into the shards at the end. All microbatches of the step
share the copy, no token leaves its rank, and nothing is read on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from malora_dist.config import Config
from malora_dist.exchange.base import PARAMETER_BYTES, Exchange, Site, register
from malora_dist.exchange.local import Local


class _Layer:
    """The expert parameters of one layer, gathered and reduced in one collective each."""

    def __init__(self) -> None:
        self.shards: list[torch.nn.Parameter] = []
        self.work: Any = None
        self.gathered: Tensor | None = None  # [ranks, numbers of one rank's shards, one after the other]
        self.full: list[Tensor] = []


@register("gather_experts")
class GatherExperts(Local):
    """Full copies of the sharded expert parameters, for the length of a step."""

    is_automatic = True

    def __init__(self, num_experts: int, group: ProcessGroup, device: torch.device) -> None:
        super().__init__(num_experts, group, device)
        self._layers: dict[int, _Layer] = {}
        self._places: dict[torch.nn.Parameter, tuple[_Layer, int]] = {}

    @classmethod
    def check(cls, config: Config) -> None:
        Exchange.check(config)

    @classmethod
    def bytes_sent(cls, site: Site) -> float:
        """All-gather of the weights and reduce-scatter of the gradients, once: (EP - 1) / EP of either."""
        ep, method = site.expert_parallel, site.method
        experts = [name for name, param in method.parameters.items() if param.is_expert]
        gathered = sum(site.numbers(name) for name in experts)
        reduced = sum(site.numbers(name) for name in experts if method.is_trained(name))
        return (ep - 1) / ep * (gathered + reduced) * PARAMETER_BYTES

    @classmethod
    def bytes_held(cls, site: Site) -> int:
        """The full copy and its gradient."""
        method = site.method
        experts = [name for name, param in method.parameters.items() if param.is_expert]
        return sum(site.numbers(name) * PARAMETER_BYTES * (1 + method.is_trained(name)) for name in experts)

    def add(self, layer_number: int, parameters: Sequence[torch.nn.Parameter]) -> None:
        layer = self._layers.setdefault(layer_number, _Layer())
        for parameter in parameters:
            self._places[parameter] = layer, len(layer.shards)
            layer.shards.append(parameter)

    @torch.no_grad()
    def begin_step(self) -> None:
        """Begin gathering the current weights, layer by layer; returns at once.

        What is not needed yet travels while the first layers compute.
        """
        for layer in self._layers.values():
            flat = torch.cat([shard.detach().flatten() for shard in layer.shards])
            layer.full = []
            layer.gathered = flat.new_empty(self._ranks, flat.shape[0])
            layer.work = dist.all_gather(list(layer.gathered), flat, group=self._group, async_op=True)

    def weights(self, parameter: torch.nn.Parameter) -> Tensor:
        """The parameter with all ranks' experts, [N, ...]: a leaf whose gradient stays on this rank for now."""
        layer, index = self._places[parameter]
        if layer.gathered is not None:
            layer.work.wait()
            with torch.no_grad():
                columns = layer.gathered.split([shard.numel() for shard in layer.shards], dim=1)
                layer.full = [
                    part.reshape(-1, *shard.shape[1:]).requires_grad_(shard.requires_grad)
                    for part, shard in zip(columns, layer.shards, strict=True)
                ]
            layer.work = layer.gathered = None
        assert layer.full, "begin_step() comes before the first forward of a step or an evaluation"
        return layer.full[index]

    @torch.no_grad()
    def end_step(self, with_gradients: bool) -> None:
        """Sum the full gradients over the group into the shards' ``main_grad``; the copies end."""
        for layer in self._layers.values():
            trained = [shard for shard in layer.shards if shard.requires_grad]
            if with_gradients and trained:
                self._reduce(trained)
            layer.full = []

    def _reduce(self, shards: Sequence[torch.nn.Parameter]) -> None:
        copies = [self.weights(shard) for shard in shards]
        grads = torch.cat(
            [(torch.zeros_like(copy) if copy.grad is None else copy.grad).reshape(self._ranks, -1) for copy in copies],
            dim=1,
        )
        own = torch.empty_like(grads[0])
        dist.reduce_scatter(own, list(grads), group=self._group)
        for shard, grad in zip(shards, own.split([shard.numel() for shard in shards]), strict=True):
            shard.main_grad.add_(grad.view_as(shard))  # type: ignore[attr-defined]
