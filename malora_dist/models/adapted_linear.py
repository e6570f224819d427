"""megatron-core's parallel linears with adapters: placement, marks and the order of collectives.

One adapter per Hugging Face projection, also inside megatron's fused qkv and fc1. Where each
parameter lives and how megatron is told (``sequence_parallel``: sum the gradient over TP;
``allreduce=False``: average it over expert-data-parallel ranks only; ``tensor_model_parallel``:
a shard, not a replica) stands in :func:`placement`, the table of docs/architecture.md in code.

Shape suffixes: S sequence on this rank, B batch, T = S * B tokens, I input width n on this rank,
M output width m on this rank, Z width of z, N experts, E experts of this rank, J tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    all_to_all_hp2sp,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from malora_dist.adapters import maths
from malora_dist.adapters.init import initial_parameter
from malora_dist.adapters.spec import AdapterSpec
from malora_dist.dispatch.base import TokenDispatcher
from malora_dist.models.routing_context import RoutingContext
from malora_dist.parallel.topology import Topology

Style = Literal["column", "row"]


@dataclass(frozen=True)
class AdapterSettings:
    """What all adapters of one model have in common."""

    spec: AdapterSpec
    topology: Topology
    dispatcher: TokenDispatcher
    context: RoutingContext
    seed: int


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
    """The table of docs/architecture.md, one row per parameter.

    MoLoRA's A is kept whole on every TP rank (a departure from the table: its input is x itself,
    which crosses TP hidden-wide either way, and the whole A_t needs no second reduction).
    """
    is_expert = spec.is_mixture and name in ("P", "A", "B")
    if style == "column" and name == "B":
        return Placement(tp_axis=1 if spec.is_mixture else 0, expert_axis=0 if is_expert else None, sum_over_tp=False)
    if style == "row" and not is_expert and name in ("S", "A", "router"):
        return Placement(tp_axis=1, expert_axis=None, sum_over_tp=False)
    return Placement(tp_axis=None, expert_axis=0 if is_expert else None, sum_over_tp=True)


class ProjectionAdapter(torch.nn.Module):
    """One adapter beside one projection: what it adds to the projection's output.

    Args:
        in_features, out_features: full widths of the projection.
        layer_number: 0-based, in the whole model.
    """

    def __init__(
        self,
        settings: AdapterSettings,
        layer_number: int,
        projection: str,
        in_features: int,
        out_features: int,
        style: Style,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.spec = settings.spec
        self.style = style
        self.site = f"layers.{layer_number}.{projection}"
        topology = settings.topology
        self._tp_group, self._tp = topology.tp_group, topology.tp_size
        local = self.spec.num_experts // topology.ep_size
        experts = range(topology.ep_rank * local, (topology.ep_rank + 1) * local)
        for name in self.spec.parameter_names:
            where = placement(self.spec, name, style)
            value = initial_parameter(
                self.spec, name, in_features, out_features, settings.seed, layer_number, projection, experts
            )
            if where.tp_axis is not None:
                value = value.chunk(self._tp, dim=where.tp_axis)[topology.tp_rank]
            parameter = torch.nn.Parameter(
                value.to(topology.device).contiguous(), requires_grad=name not in self.spec.frozen_names
            )
            marks = {
                "sequence_parallel": where.sum_over_tp,
                "allreduce": where.expert_axis is None,
                "tensor_model_parallel": where.tp_axis is not None,
            }
            for mark, is_set in marks.items():
                setattr(parameter, mark, is_set)
            self.register_parameter(name, parameter)

    def forward(self, x_SBI: Tensor) -> Tensor:
        """What the adapter adds: column [S * TP, B, M / TP], row [S / TP, B, M], in x's dtype."""
        params = dict(self.named_parameters(recurse=False))
        x_TI = x_SBI.flatten(0, 1)
        z_TZ = maths.project(self.spec, params, self._dropout(x_TI))
        if not self.spec.is_mixture:
            y_TM = maths.expert_forward(self.spec, params, self._cross_tp(z_TZ.float()).to(x_TI.dtype), None)
        else:
            z_TZ, routing = self._route(z_TZ, maths.router_logits(x_TI, params["router"]))
            tokens = self.settings.dispatcher.dispatch(z_TZ, routing)
            y_WM = maths.expert_forward(self.spec, params, tokens.rows_WZ, tokens.gates_WE)
            y_TM = self.settings.dispatcher.combine(y_WM, tokens)
        return y_TM.view(-1, x_SBI.shape[1], y_TM.shape[-1])

    def _dropout(self, x_TI: Tensor) -> Tensor:
        """Under TP each rank holds other tokens (column) or other features (row): own masks."""
        if not self.training or self.spec.lora_dropout == 0.0:
            return x_TI
        if self._tp == 1:
            return F.dropout(x_TI, self.spec.lora_dropout)
        with get_cuda_rng_tracker().fork():
            return F.dropout(x_TI, self.spec.lora_dropout)

    def _cross_tp(self, local: Tensor) -> Tensor:
        """Column: gather the sequence shards. Row: sum the partial products, keep the own shard.

        The row's input must be contiguous: megatron's reduction leaves other tensors unreduced.
        """
        if self._tp == 1:
            return local
        if self.style == "column":
            return gather_from_sequence_parallel_region(local, tensor_parallel_output_grad=True, group=self._tp_group)
        return reduce_scatter_to_sequence_parallel_region(local.contiguous(), group=self._tp_group)

    def _route(self, z_TZ: Tensor, logits_TN: Tensor) -> tuple[Tensor, maths.Routing]:
        """Bring z and logits across TP and route.

        The load-balancing loss is taken where every token is on one TP rank only: before the
        column gather, after the row reduce-scatter.
        """
        spec = self.spec
        if self.style == "row" and self._tp > 1:
            z_TZ, logits_TN = self._cross_tp_with_logits(z_TZ, logits_TN)
        routing = maths.route(logits_TN, spec.topk, spec.norm_topk_prob)
        z_TZ = self._attach_load_balancing(z_TZ, routing)
        if self.style == "column" and self._tp > 1:
            z_TZ, logits_TN = self._cross_tp_with_logits(z_TZ, logits_TN)
            routing = maths.route(logits_TN, spec.topk, spec.norm_topk_prob)
        return z_TZ, routing

    def _cross_tp_with_logits(self, z_TZ: Tensor, logits_TN: Tensor) -> tuple[Tensor, Tensor]:
        """z and logits cross TP as one float32 tensor, d + N wide.

        MoLoRA's z is x itself: it crosses hidden-wide, by itself, in its own dtype.
        """
        if self.spec.method == "molora":
            crossed = self._cross_tp(z_TZ) if self.style == "column" else all_to_all_hp2sp(z_TZ, group=self._tp_group)
            return crossed, self._cross_tp(logits_TN)
        stack = self._cross_tp(torch.cat((z_TZ.float(), logits_TN), dim=-1))
        z, logits = stack.split((z_TZ.shape[-1], logits_TN.shape[-1]), dim=-1)
        return z.to(z_TZ.dtype), logits

    def _attach_load_balancing(self, z_TZ: Tensor, routing: maths.Routing) -> Tensor:
        """z with the gradient of this microbatch's load-balancing loss attached; records statistics.

        f and p are summed over TP before their product, so that no layout changes the loss; the
        gradient of p stays on the rank that holds the token.
        """
        context, spec = self.settings.context, self.spec
        wants_loss = torch.is_grad_enabled() and spec.aux_loss_coeff > 0
        if not (wants_loss or context.recording):
            return z_TZ
        num_experts = spec.num_experts
        tasks_T = context.local_tasks(z_TZ.shape[0], self.settings.topology.tp_rank, self._tp, z_TZ.device)
        valid_T = (tasks_T > 0).float()
        slots = (tasks_T.unsqueeze(-1) * num_experts + routing.experts_TK).flatten()
        counts_JN = torch.zeros((context.num_tasks + 1) * num_experts, device=z_TZ.device)
        counts_JN = counts_JN.index_add_(0, slots, torch.ones_like(slots, dtype=torch.float32)).view(-1, num_experts)

        sums = torch.stack((counts_JN[1:].sum(dim=0), valid_T @ routing.probs_TN))
        if self._tp > 1:
            sums = reduce_from_tensor_model_parallel_region(sums, group=self._tp_group)
        slots_N, probs_N = sums.unbind(0)
        aux_loss = maths.load_balancing_loss(spec, slots_N.detach(), probs_N)
        if context.recording:
            entropy = -(torch.xlogy(routing.probs_TN, routing.probs_TN).sum(dim=-1) * valid_T).sum()
            context.record(self.site, counts_JN, entropy.detach(), aux_loss.detach())
        return MoEAuxLossAutoScaler.apply(z_TZ, aux_loss) if wants_loss else z_TZ

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Sequence[tuple[int, int, int]] = (), metadata: dict | None = None
    ) -> dict[str, ShardedTensor]:
        """megatron ShardedTensors of the global shape [num_layers, *AdapterSpec.parameter_shape]."""
        topology = self.settings.topology
        prepended = len(sharded_offsets)
        sharded = {}
        for name, parameter in self.named_parameters(recurse=False):
            where = placement(self.spec, name, self.style)
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


def fuse_outputs(parts: Sequence[Tensor], groups: int) -> Tensor:
    """Lay the outputs of several projections into megatron's fused order.

    qkv is interleaved by query group ([q heads | k | v] per group); fc1 is one group [gate | up].

    Args:
        parts: one [..., width] tensor per projection, in fused order, on this TP rank.
        groups: query groups on this rank, or 1 for fc1.
    """
    return torch.cat([part.unflatten(-1, (groups, -1)) for part in parts], dim=-1).flatten(-2)


class _Adapters(torch.nn.ModuleDict):
    """The adapters beside one of megatron's linears, by projection.

    Args:
        widths: full (in, out) widths of every projection fused into the linear, in fused order,
            those without an adapter included.
        groups: see :func:`fuse_outputs`; full number, over all TP ranks.
    """

    def __init__(
        self,
        settings: AdapterSettings,
        layer_number: int,
        widths: dict[str, tuple[int, int]],
        style: Style,
        groups: int,
    ) -> None:
        super().__init__(
            {
                projection: ProjectionAdapter(settings, layer_number, projection, *widths[projection], style)
                for projection in widths
                if projection in settings.spec.projections
            }
        )
        self._tp = settings.topology.tp_size if style == "column" else 1
        self._groups = max(groups // self._tp, 1)
        self._widths = {projection: out_features // self._tp for projection, (_, out_features) in widths.items()}

    def forward(self, x_SBI: Tensor) -> Tensor:
        """The adapters' outputs in the linear's fused order."""
        deltas = {projection: adapter(x_SBI) for projection, adapter in self.items()}
        if len(self._widths) == 1:
            return next(iter(deltas.values()))
        some = next(iter(deltas.values()))
        parts = [
            deltas[projection] if projection in deltas else some.new_zeros(*some.shape[:-1], width)
            for projection, width in self._widths.items()
        ]
        return fuse_outputs(parts, self._groups)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Sequence[tuple[int, int, int]] = (), metadata: dict | None = None
    ) -> dict[str, ShardedTensor]:
        sharded: dict[str, ShardedTensor] = {}
        for projection, adapter in self.items():
            assert isinstance(adapter, ProjectionAdapter)
            sharded.update(adapter.sharded_state_dict(f"{prefix}{projection}.", sharded_offsets, metadata))
        return sharded


ADAPTERS = "adapters"


def is_adapter_key(key: str) -> bool:
    """Whether a state-dict key or parameter name belongs to an adapter rather than to the base."""
    return f".{ADAPTERS}." in key


def _with_adapter_shards(linear: Any, base: dict[str, Any], prefix: str, offsets: Any, metadata: Any) -> dict[str, Any]:
    """The linear's own sharded state dict, in which megatron took the adapters for plain replicas."""
    own = {key: value for key, value in base.items() if not key.startswith(f"{prefix}{ADAPTERS}.")}
    return own | linear.adapters.sharded_state_dict(f"{prefix}{ADAPTERS}.", offsets, metadata)


class AdaptedColumnParallelLinear(ColumnParallelLinear):
    """megatron's ColumnParallelLinear plus one adapter per projection fused into it."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        settings: AdapterSettings,
        layer_number: int,
        widths: dict[str, tuple[int, int]],
        groups: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(input_size, output_size, **kwargs)
        self.adapters = _Adapters(settings, layer_number, widths, "column", groups)

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(input_, *args, **kwargs)
        return output + self.adapters(input_), bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: dict | None = None) -> dict:
        base = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return _with_adapter_shards(self, base, prefix, sharded_offsets, metadata)


class AdaptedRowParallelLinear(RowParallelLinear):
    """megatron's RowParallelLinear plus one adapter; it works on the rank's own sequence shard."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        settings: AdapterSettings,
        layer_number: int,
        widths: dict[str, tuple[int, int]],
        **kwargs: Any,
    ) -> None:
        super().__init__(input_size, output_size, **kwargs)
        self.adapters = _Adapters(settings, layer_number, widths, "row", 1)

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(input_)
        return output + self.adapters(input_), bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: dict | None = None) -> dict:
        base = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return _with_adapter_shards(self, base, prefix, sharded_offsets, metadata)
