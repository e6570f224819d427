"""The parameters of one adapter beside a megatron linear: where each lives and how megatron is told.

``sequence_parallel``: sum the gradient over TP; ``allreduce=False``: average it over
expert-data-parallel ranks only; ``tensor_model_parallel``: a shard, not a replica. Which parameter
gets which mark stands in :func:`placement`, the table of docs/architecture.md in code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor

from malora_dist.exchange.factory import DispatchPlan
from malora_dist.layers.routing_context import RoutingContext
from malora_dist.methods.spec import AdapterSpec
from malora_dist.methods.start import initial_parameter
from malora_dist.parallel.topology import Topology

Style = Literal["column", "row"]


@dataclass(frozen=True)
class AdapterSettings:
    """What all adapters of one model have in common."""

    spec: AdapterSpec
    topology: Topology
    plan: DispatchPlan
    context: RoutingContext
    seed: int
    expert_compute: str = "auto"


@dataclass(frozen=True)
class Placement:
    """How one parameter lies on the ranks.

    Attributes:
        tp_axis: axis sharded over tensor-parallel ranks; None: replicated there.
        expert_axis: axis sharded over expert-parallel ranks; None: replicated there.
        sum_over_tp: each TP rank sees other tokens (or another part of the output), so the
            gradients of the replicas have to be summed.
    """

    tp_axis: int | None
    expert_axis: int | None
    sum_over_tp: bool


def placement(spec: AdapterSpec, name: str, style: Style) -> Placement:
    """The table of docs/architecture.md, one row per parameter."""
    is_expert = spec.is_mixture and name in ("P", "A", "B")
    if style == "column" and name == "B":
        return Placement(tp_axis=1 if spec.is_mixture else 0, expert_axis=0 if is_expert else None, sum_over_tp=False)
    if style == "row" and name in ("S", "A", "router"):  # the input is sharded
        return Placement(tp_axis=2 if is_expert else 1, expert_axis=0 if is_expert else None, sum_over_tp=False)
    return Placement(tp_axis=None, expert_axis=0 if is_expert else None, sum_over_tp=True)


class Adapter(torch.nn.Module):
    """One adapter beside one projection, or beside several that share all its parameters but B.

    Args:
        name: of the adapter, see ``AdapterSpec.adapter_groups``.
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
        self.settings = settings
        self.spec = settings.spec
        self.style = style
        self.site = f"layers.{layer_number}.{name}"
        self.projections = tuple(out_features)
        self._tp = settings.topology.tp_size
        self._kinds: dict[str, str] = {}  # {name of a registered parameter: its name in the spec}
        for kind in self.spec.parameter_names:
            for projection, width in out_features.items() if kind == "B" else [(name, 0)]:
                key = self.spec.stored_name(kind, projection, self.projections)
                self._kinds[key] = kind
                self.register_parameter(key, self._start(kind, layer_number, name, in_features, width))

    def _start(self, kind: str, layer_number: int, name: str, in_features: int, width: int) -> torch.nn.Parameter:
        """This rank's shard of one parameter at its start, with megatron's marks."""
        spec, topology = self.spec, self.settings.topology
        local = spec.num_experts // topology.ep_size
        experts = range(topology.ep_rank * local, (topology.ep_rank + 1) * local)
        value = initial_parameter(spec, kind, in_features, width, self.settings.seed, layer_number, name, experts)
        where = placement(spec, kind, self.style)
        if where.tp_axis is not None:
            value = value.chunk(self._tp, dim=where.tp_axis)[topology.tp_rank]
        parameter = torch.nn.Parameter(
            value.to(topology.device).contiguous(), requires_grad=kind not in spec.frozen_names
        )
        marks = {
            "sequence_parallel": where.sum_over_tp,
            "allreduce": where.expert_axis is None,
            "tensor_model_parallel": where.tp_axis is not None,
        }
        for mark, is_set in marks.items():
            setattr(parameter, mark, is_set)
        return parameter

    @property
    def expert_parameters(self) -> list[torch.nn.Parameter]:
        """Those that are sharded over the expert-parallel ranks."""
        kinds = self._kinds.items()
        return [
            getattr(self, key) for key, kind in kinds if placement(self.spec, kind, self.style).expert_axis is not None
        ]

    def up(self, projection: str) -> torch.nn.Parameter:
        """B of a projection."""
        return self.get_parameter(self.spec.stored_name("B", projection, self.projections))

    def dropout(self, x_TI: Tensor) -> Tensor:
        """Under TP each rank holds other tokens (column) or other features (row): own masks."""
        if not self.training or self.spec.lora_dropout == 0.0:
            return x_TI
        if self._tp == 1:
            return F.dropout(x_TI, self.spec.lora_dropout)
        with get_cuda_rng_tracker().fork():
            return F.dropout(x_TI, self.spec.lora_dropout)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Sequence[tuple[int, int, int]] = (), metadata: dict | None = None
    ) -> dict[str, ShardedTensor]:
        """megatron ShardedTensors of the global shape [num_layers, *AdapterSpec.parameter_shape]."""
        topology = self.settings.topology
        prepended = len(sharded_offsets)
        sharded = {}
        for name, parameter in self.named_parameters(recurse=False):
            where = placement(self.spec, self._kinds[name], self.style)
            offsets = list(sharded_offsets)
            if where.expert_axis is not None:
                offsets.append((prepended + where.expert_axis, topology.ep_rank, topology.ep_size))
            if where.tp_axis is not None:
                offsets.append((prepended + where.tp_axis, topology.tp_rank, topology.tp_size))
            data_replica = topology.dp_rank if where.expert_axis is None else topology.edp_group.rank()
            sharded[prefix + name] = ShardedTensor.from_rank_offsets(
                prefix + name,
                parameter,
                *offsets,
                replica_id=(0, topology.tp_rank if where.tp_axis is None else 0, data_replica),
                prepend_axis_num=prepended,
            )
        return sharded
