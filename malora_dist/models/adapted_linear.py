"""megatron-core's parallel linears with adapters: placement, marks and the order of collectives.

One adapter per Hugging Face projection, also inside megatron's fused qkv and fc1; with
``fuse_projections`` one per fused linear, in which only B is the projection's own. Where each
parameter lives and how megatron is told (``sequence_parallel``: sum the gradient over TP;
``allreduce=False``: average it over expert-data-parallel ranks only; ``tensor_model_parallel``:
a shard, not a replica) stands in :func:`placement`, the table of docs/architecture.md in code.

Shape suffixes: S sequence on this rank, B batch, T = S * B tokens, I input width n on this rank,
M output width m on this rank, Z width of z, N experts, E experts of this rank, J tasks, U all inner
values of the experts at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, is_checkpointing
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
        self._tp_group, self._tp = settings.topology.tp_group, settings.topology.tp_size
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

    def _params(self) -> dict[str, Tensor]:
        """The parameters by their names in the spec; the B of several projections as one, side by side."""
        params: dict[str, Tensor] = {}
        for key, parameter in self.named_parameters(recurse=False):
            kind = self._kinds[key]
            params[kind] = torch.cat((params[kind], parameter), dim=-2) if kind in params else parameter
        return params

    def forward(self, x_SBI: Tensor) -> dict[str, Tensor]:
        """What the adapter adds to each projection: column [S * TP, B, M / TP], row [S / TP, B, M], in x's dtype."""
        params = self._params()
        x_TI = x_SBI.flatten(0, 1)
        z_TZ = maths.project(self.spec, params, self._dropout(x_TI))
        if not self.spec.is_mixture:
            y_TM = maths.expert_forward(self.spec, params, self._cross_tp(z_TZ.float()).to(x_TI.dtype), None)
        elif self.spec.method == "molora" and self._tp > 1:
            y_TM = self._send_input_across(z_TZ, maths.router_logits(x_TI, params["router"]), params)
        else:
            z_TZ, routing = self._route(z_TZ, maths.router_logits(x_TI, params["router"]))
            tokens = self.settings.dispatcher.dispatch(z_TZ, routing)
            y_WM = maths.expert_forward(self.spec, params, tokens.rows_WZ, tokens.gates_WE)
            y_TM = self.settings.dispatcher.combine(y_WM, tokens)
        y_SBM = y_TM.view(-1, x_SBI.shape[1], y_TM.shape[-1])
        widths = [p.shape[-2] for key, p in self.named_parameters(recurse=False) if self._kinds[key] == "B"]
        return dict(zip(self.projections, y_SBM.split(widths, dim=-1), strict=True))

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
        """Bring z and logits across TP, as one float32 tensor d + N wide, and route.

        The load-balancing loss is taken where every token is on one TP rank only: before the
        column gather, after the row reduce-scatter.
        """
        if self._tp > 1 and self.style == "row":
            z_TZ, logits_TN = self._cross_tp_together(z_TZ, logits_TN)
        routing = self._routing(logits_TN)
        z_TZ = self._attach_load_balancing(z_TZ, routing)
        if self._tp > 1 and self.style == "column":
            z_TZ, logits_TN = self._cross_tp_together(z_TZ, logits_TN)
            routing = self._routing(logits_TN)
        return z_TZ, routing

    def _routing(self, logits_TN: Tensor) -> maths.Routing:
        return maths.route(logits_TN, self.spec.topk, self.spec.norm_topk_prob)

    def _cross_tp_together(self, z_TZ: Tensor, logits_TN: Tensor) -> tuple[Tensor, Tensor]:
        stack = self._cross_tp(torch.cat((z_TZ.float(), logits_TN), dim=-1))
        z, logits = stack.split((z_TZ.shape[-1], logits_TN.shape[-1]), dim=-1)
        return z.to(z_TZ.dtype), logits

    def _send_input_across(self, x_TI: Tensor, logits_TN: Tensor, params: dict[str, Tensor]) -> Tensor:
        """MoLoRA under TP: x goes to the experts from where it is, their r-wide inner values cross TP. [T, M]

        Column: a rank sends its sequence shard's x, and B's output shards need the inner values of
        all tokens. Row: a rank sends its features of all tokens, whose partial products by its
        shard of A_t are summed for the tokens of each sequence shard.
        """
        dispatcher: Any = self.settings.dispatcher  # a ShardedRowsDispatcher: the config refuses others
        column = self.style == "column"
        if not column:
            logits_TN = self._cross_tp(logits_TN)
        shard = self._routing(logits_TN)
        x_TI = self._attach_load_balancing(x_TI, shard)
        # Gradients of the gates arise where the rows are: for a column on the shard's own rank, for a row on
        # every TP rank a part, which the gather's backward sums.
        gather = partial(gather_from_sequence_parallel_region, group=self._tp_group)
        if column:
            experts_TK = gather(shard.experts_TK)
            tokens = dispatcher.dispatch(x_TI, shard)
        else:
            everywhere = self._routing(gather(logits_TN, tensor_parallel_output_grad=True))
            experts_TK = everywhere.experts_TK
            tokens = dispatcher.dispatch(x_TI, everywhere)
        u_WU = maths.expert_down(self.spec, params, tokens.rows_WZ, tokens.gates_WE)
        cross = dispatcher.gather if column else dispatcher.reduce_scatter
        u_WU, tokens = cross(u_WU, tokens, experts_TK, self._tp_group)
        return dispatcher.combine(maths.expert_up(params["B"], u_WU), tokens)

    def _attach_load_balancing(self, z_TZ: Tensor, routing: maths.Routing) -> Tensor:
        """z with the gradient of this microbatch's load-balancing loss attached; records statistics.

        f and p are summed over TP before their product, so that no layout changes the loss; the
        gradient of p stays on the rank that holds the token.
        """
        context, spec = self.settings.context, self.spec
        wants_loss = torch.is_grad_enabled() and spec.aux_loss_coeff > 0
        is_recording = context.recording and not (is_checkpointing() and torch.is_grad_enabled())  # not when recomputed
        if not (wants_loss or is_recording):
            return z_TZ
        num_experts = spec.num_experts
        tasks_T = context.local_tasks(routing.probs_TN.shape[0], self.settings.topology.tp_rank, self._tp, z_TZ.device)
        valid_T = (tasks_T > 0).float()
        slots = (tasks_T.unsqueeze(-1) * num_experts + routing.experts_TK).flatten()
        counts_JN = torch.zeros((context.num_tasks + 1) * num_experts, device=z_TZ.device)
        counts_JN = counts_JN.index_add_(0, slots, torch.ones_like(slots, dtype=torch.float32)).view(-1, num_experts)

        sums = torch.stack((counts_JN[1:].sum(dim=0), valid_T @ routing.probs_TN))
        if self._tp > 1:
            sums = reduce_from_tensor_model_parallel_region(sums, group=self._tp_group)
        slots_N, probs_N = sums.unbind(0)
        aux_loss = maths.load_balancing_loss(spec, slots_N.detach(), probs_N)
        if is_recording:
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


def fuse_outputs(parts: Sequence[Tensor], groups: int) -> Tensor:
    """Lay the outputs of several projections into megatron's fused order.

    qkv is interleaved by query group ([q heads | k | v] per group); fc1 is one group [gate | up].

    Args:
        parts: one [..., width] tensor per projection, in fused order, on this TP rank.
        groups: query groups on this rank, or 1 for fc1.
    """
    return torch.cat([part.unflatten(-1, (groups, -1)) for part in parts], dim=-1).flatten(-2)


class _Adapters(torch.nn.ModuleDict):
    """The adapters beside one of megatron's linears, by name.

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
                name: Adapter(
                    settings,
                    layer_number,
                    name,
                    widths[group[0]][0],
                    {projection: widths[projection][1] for projection in group},
                    style,
                )
                for name, group in settings.spec.adapter_groups
                if group[0] in widths
            }
        )
        self._tp = settings.topology.tp_size if style == "column" else 1
        self._groups = max(groups // self._tp, 1)
        self._widths = {projection: out_features // self._tp for projection, (_, out_features) in widths.items()}

    def forward(self, x_SBI: Tensor) -> Tensor:
        """The adapters' outputs in the linear's fused order."""
        deltas: dict[str, Tensor] = {}
        for adapter in self.values():
            deltas |= adapter(x_SBI)
        some = next(iter(deltas.values()))
        if len(self._widths) == 1:
            return some
        parts = [
            deltas[projection] if projection in deltas else some.new_zeros(*some.shape[:-1], width)
            for projection, width in self._widths.items()
        ]
        return fuse_outputs(parts, self._groups)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Sequence[tuple[int, int, int]] = (), metadata: dict | None = None
    ) -> dict[str, ShardedTensor]:
        sharded: dict[str, ShardedTensor] = {}
        for name, adapter in self.items():
            assert isinstance(adapter, Adapter)
            sharded.update(adapter.sharded_state_dict(f"{prefix}{name}.", sharded_offsets, metadata))
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
