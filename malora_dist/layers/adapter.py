"""The parameters of one adapter beside a megatron linear: where each lives and how megatron is told.

``sequence_parallel``: sum the gradient over TP; ``allreduce=False``: reduce it over
expert-data-parallel ranks only; ``tensor_model_parallel``: a shard, not a replica. Which parameter
gets which mark follows from its axes (``Param.placement``); docs/architecture.md shows the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor

from malora_dist.exchange.plan import ExchangePlan
from malora_dist.layers.routing_context import RoutingContext
from malora_dist.methods.base import Method, Style
from malora_dist.methods.initial import initial_parameter
from malora_dist.methods.spec import AdapterSpec
from malora_dist.parallel.topology import Topology


@dataclass(frozen=True)
class AdapterSettings:
    """What all adapters of one model have in common."""

    spec: AdapterSpec
    topology: Topology
    plan: ExchangePlan
    context: RoutingContext
    seed: int
    expert_compute: str = "auto"


class Adapter(torch.nn.Module):
    """One adapter beside one projection, or beside several that share every parameter without an ``out`` axis.

    Args:
        name: of the adapter, see ``AdapterSpec.adapters``.
        out_features: full output width of each projection, {projection: m}.
        in_features: full input width.
        layer_number: 0-based, in the whole model.
    """

    def __init__(
        self,
        settings: AdapterSettings,
        layer_number: int,
        name: str,
        in_features: int,
        out_features: dict[str, int],
        style: Style,
    ) -> None:
        super().__init__()
        self.settings, self.style = settings, style
        self.method: Method = settings.spec.declared
        self.site = f"layers.{layer_number}.{name}"
        self.projections = tuple(out_features)
        self._stored = settings.spec.stored_parameters(self.projections)
        for projection, width in out_features.items():
            self.method.check_widths(projection, in_features, width)
        for key, (declared, projections) in self._stored.items():
            width = out_features[projections[0]]
            self.register_parameter(key, self._start(declared, layer_number, name, in_features, width))

    def _start(
        self, declared: str, layer_number: int, name: str, in_features: int, out_features: int
    ) -> torch.nn.Parameter:
        """This rank's shard of one parameter at its start, with megatron's marks."""
        topology, method = self.settings.topology, self.method
        local = method.num_experts // topology.ep_size
        experts = range(topology.ep_rank * local, (topology.ep_rank + 1) * local)
        value = initial_parameter(
            method, declared, in_features, out_features, self.settings.seed, layer_number, name, experts
        )
        where = method.parameters[declared].placement(self.style)
        if where.tp_axis is not None:
            value = value.chunk(topology.tp_size, dim=where.tp_axis)[topology.tp_rank]
        parameter = torch.nn.Parameter(
            value.to(topology.device).contiguous(), requires_grad=method.is_trained(declared)
        )
        for mark, is_set in where.marks.items():
            setattr(parameter, mark, is_set)
        return parameter

    @property
    def expert_parameters(self) -> list[torch.nn.Parameter]:
        """Those that are sharded over the expert-parallel ranks."""
        experts = [key for key, (declared, _) in self._stored.items() if self.method.parameters[declared].is_expert]
        return [self.get_parameter(key) for key in experts]

    def parameters_of(self, projection: str) -> dict[str, torch.nn.Parameter]:
        """The parameters that act on a projection, {declared name: this rank's shard}."""
        return {
            declared: self.get_parameter(key)
            for key, (declared, projections) in self._stored.items()
            if projection in projections
        }

    def dropout(self, x_TI: Tensor) -> Tensor:
        """Under TP each rank holds other tokens (column) or other features (row): own masks."""
        share = self.settings.spec.lora_dropout
        if not self.training or share == 0.0:
            return x_TI
        if self.settings.topology.tp_size == 1:
            return F.dropout(x_TI, share)
        with get_cuda_rng_tracker().fork():
            return F.dropout(x_TI, share)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Sequence[tuple[int, int, int]] = (), metadata: dict | None = None
    ) -> dict[str, ShardedTensor]:
        """megatron ShardedTensors of the global shape [num_layers, *Method.shape]."""
        topology = self.settings.topology
        prepended = len(sharded_offsets)
        sharded = {}
        for key, (declared, _) in self._stored.items():
            where = self.method.parameters[declared].placement(self.style)
            offsets = list(sharded_offsets)
            if where.expert_axis is not None:
                offsets.append((prepended + where.expert_axis, topology.ep_rank, topology.ep_size))
            if where.tp_axis is not None:
                offsets.append((prepended + where.tp_axis, topology.tp_rank, topology.tp_size))
            data_replica = topology.dp_rank if where.expert_axis is None else topology.edp_group.rank()
            sharded[prefix + key] = ShardedTensor.from_rank_offsets(
                prefix + key,
                self.get_parameter(key),
                *offsets,
                replica_id=(0, topology.tp_rank if where.tp_axis is None else 0, data_replica),
                prepend_axis_num=prepended,
            )
        return sharded
