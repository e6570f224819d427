"""The experts come to the tokens: every rank gathers all experts' weights once per optimizer step.

Weights, gradients and optimizer state stay sharded over the expert-parallel group; for the length
of one optimizer step each rank has a full copy of every P and B beside its shard, and a full
gradient that is summed over the group into the shards at the end. All microbatches of the step
share the copy, no token leaves its rank, and nothing is read on the host.

Shape suffixes: R ranks of the group, F numbers of one layer's shards, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


class _Layer:
    """The expert parameters of one layer, gathered and reduced in one collective each."""

    def __init__(self) -> None:
        self.shards: list[torch.nn.Parameter] = []
        self.work: Any = None
        self.gathered_RF: Tensor | None = None
        self.full: list[Tensor] = []


class GatheredExperts:
    """Full copies of sharded expert parameters.

    Args:
        group: the expert-parallel group; expert e lies on rank e // (N / R), on axis 0 of its parameters.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self._layers: dict[int, _Layer] = {}
        self._places: dict[torch.nn.Parameter, tuple[_Layer, int]] = {}

    def add(self, layer_number: int, parameters: Sequence[torch.nn.Parameter]) -> None:
        """From now on gather these expert shards, float32 [E, ...], with their layer's."""
        layer = self._layers.setdefault(layer_number, _Layer())
        for parameter in parameters:
            self._places[parameter] = layer, len(layer.shards)
            layer.shards.append(parameter)

    def num_parameters(self) -> int:
        """Numbers in all full copies."""
        return self._group.size() * sum(shard.numel() for shard in self._places)

    @torch.no_grad()
    def start(self) -> None:
        """Begin gathering the current weights, layer by layer; returns at once.

        Called before the first microbatch of a step: what is not needed yet travels while the
        first layers compute.
        """
        for layer in self._layers.values():
            flat_F = torch.cat([shard.detach().flatten() for shard in layer.shards])
            layer.full = []
            layer.gathered_RF = flat_F.new_empty(self._group.size(), flat_F.shape[0])
            layer.work = dist.all_gather(list(layer.gathered_RF), flat_F, group=self._group, async_op=True)

    def full(self, parameter: torch.nn.Parameter) -> Tensor:
        """The parameter with all ranks' experts, [N, ...]: a leaf whose gradient stays on this rank for now."""
        layer, index = self._places[parameter]
        if layer.gathered_RF is not None:
            layer.work.wait()
            with torch.no_grad():
                columns = layer.gathered_RF.split([shard.numel() for shard in layer.shards], dim=1)
                layer.full = [
                    part.reshape(-1, *shard.shape[1:]).requires_grad_()
                    for part, shard in zip(columns, layer.shards, strict=True)
                ]
            layer.work = layer.gathered_RF = None
        assert layer.full, "start() comes before the first forward of a step or an evaluation"
        return layer.full[index]

    def release(self) -> None:
        """Drop the copies, of which no gradient is wanted."""
        for layer in self._layers.values():
            layer.full = []

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Sum the full gradients over the group into the shards' ``main_grad``; the copies end.

        Called once per step, after the last backward and before megatron's own reductions.
        """
        ranks = self._group.size()
        for layer in self._layers.values():
            grads_RF = torch.cat(
                [
                    (torch.zeros_like(full) if full.grad is None else full.grad).reshape(ranks, -1)
                    for full in (self.full(shard) for shard in layer.shards)
                ],
                dim=1,
            )
            grad_F = torch.empty_like(grads_RF[0])
            dist.reduce_scatter(grad_F, list(grads_RF), group=self._group)
            for shard, grad in zip(layer.shards, grad_F.split([s.numel() for s in layer.shards]), strict=True):
                shard.main_grad.add_(grad.view_as(shard))  # type: ignore[attr-defined]
            layer.full = []
