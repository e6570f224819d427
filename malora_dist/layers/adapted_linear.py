"""megatron-core's parallel linears with adapters: the order of projections, collectives and sums.

One adapter per Hugging Face projection, also inside megatron's fused qkv and fc1; with
``fuse_projections`` one per fused linear, in which only B is the projection's own. All adapters of
a linear read its input once, cross TP and are dispatched together, and add their outputs to its
output in place.

Shape suffixes: S sequence on this rank, B batch, T = S * B tokens, I input width n on this rank,
M output width m on this rank, F output width of the whole linear on this rank, A adapters of the
linear, Z width of z, Y = A * Z, N experts, W rows that reached this rank, J tasks, U all inner
values of the experts at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import is_checkpointing
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from malora_dist.exchange.base import DispatchedTokens, Returning
from malora_dist.kernels.experts import Columns, add_experts, add_rows, add_up, project_and_score, stack_ups
from malora_dist.kernels.fused_columns import Run, columns_of, runs_of
from malora_dist.layers.adapter import Adapter, AdapterSettings, Style
from malora_dist.methods import maths

#: Adds the adapters' outputs to the base linear's, in place.
Add = Callable[[Tensor], Tensor]


class LinearAdapters(torch.nn.ModuleDict):
    """The adapters beside one of megatron's linears, by name.

    Args:
        linear: megatron's name of the linear.
        layer_number: 0-based, in the whole model.
        widths: full (in, out) widths of every projection fused into the linear, in fused order,
            those without an adapter included.
        groups: qkv is interleaved by query group ([q heads | k | v] in each), in full so many over
            all TP ranks; other linears have 1.
    """

    def __init__(
        self,
        settings: AdapterSettings,
        linear: str,
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
        self._settings, self._spec, self._style = settings, settings.spec, style
        self._tp, self._tp_group = settings.topology.tp_size, settings.topology.tp_group
        self._dispatcher: Any = settings.plan.dispatchers[linear]
        self._gathered = settings.plan.gathered if self._dispatcher.name == "gather_experts" else None
        if self._gathered is not None:
            self._gathered.add(layer_number, [p for adapter in self._list for p in adapter.expert_parameters])
        columns = columns_of(widths, groups, self._tp if style == "column" else 1)
        self._runs = [runs_of(adapter.projections, columns) for adapter in self._list]

    @property
    def _list(self) -> list[Adapter]:
        return list(self.values())  # type: ignore[arg-type]

    def begin(self, x_SBI: Tensor) -> Add:
        """Everything that comes before the sum: projection, routing, dispatch, and the start of the way back.

        The base linear runs between this and the call of what it returns: rows on their way back,
        M wide, travel behind it.

        Returns:
            the function that adds all adapters' outputs to the base output, in place:
            column [S * TP, B, F], row [S / TP, B, F].
        """
        x_TI = x_SBI.flatten(0, 1)
        if not self._spec.is_mixture:
            return partial(self._add_lora, self._cross_tp(self._project(x_TI)[0].float()).to(x_TI.dtype))
        if self._spec.method == "molora" and self._tp > 1:
            return partial(self._add_returned, self._send_input_across(x_TI))
        tokens = self._dispatcher.dispatch(*self._routed(x_TI))
        if not self._dispatcher.moves_tokens:
            return partial(self._add_local, tokens)
        returning = []
        for adapter, runs, arrived in zip(self._list, self._runs, tokens, strict=True):
            widths = [run.columns.total for run in runs]
            y_WM = arrived.rows_WZ.new_zeros(arrived.rows_WZ.shape[0], sum(widths))
            for run, start, width in zip(runs, accumulate(widths, initial=0), widths, strict=False):
                y_WM = self._compute(adapter, y_WM, arrived, run, Columns(1, start, width))
            returning.append(self._dispatcher.send_back(y_WM, arrived))
        return partial(self._add_returned, returning)

    # ---- before the experts

    def _project(self, x_TI: Tensor) -> tuple[Tensor, Tensor]:
        """(z of all adapters side by side [T, Y], their logits [T, A, N]) of this rank's part of x."""
        adapters, spec = self._list, self._spec
        if not spec.is_mixture:
            return self._project_dropped(x_TI, "A"), x_TI.new_empty(0)
        router = torch.cat([adapter.get_parameter("router") for adapter in adapters])
        if spec.method == "malora" and not (self.training and spec.lora_dropout > 0):
            z_TY, logits = project_and_score(
                x_TI, torch.cat([adapter.get_parameter("S") for adapter in adapters]), router
            )
        else:
            z_TY = self._project_dropped(x_TI, "S") if spec.method == "malora" else x_TI
            logits = project_and_score(x_TI, router.new_empty(0, x_TI.shape[1]), router)[1]
        return z_TY, logits.view(-1, len(adapters), spec.num_experts)

    def _project_dropped(self, x_TI: Tensor, kind: str) -> Tensor:
        """Each adapter's down-projection of its own dropout of x. [T, Y]"""
        shared = [adapter.get_parameter(kind).to(x_TI.dtype) for adapter in self._list]
        dropped = [adapter.dropout(x_TI) for adapter in self._list]
        if all(x is x_TI for x in dropped):
            return F.linear(x_TI, torch.cat(shared))
        return torch.cat([F.linear(x, down) for x, down in zip(dropped, shared, strict=True)], dim=-1)

    def _routed(self, x_TI: Tensor) -> tuple[list[Tensor], list[maths.Routing]]:
        """Each adapter's z and routing, of the tokens that its experts' outputs are wanted for on this rank."""
        z_TY, logits_TAN = self._project(x_TI)
        z_TY, routing = self._route(z_TY, logits_TAN)
        routings = [maths.Routing(*(t[:, i] for t in routing)) for i in range(len(self))]
        if self._spec.method == "molora":
            return [adapter.dropout(z_TY) for adapter in self._list], routings
        return list(z_TY.chunk(len(self), dim=-1)), routings

    def _cross_tp(self, local: Tensor) -> Tensor:
        """Column: gather the sequence shards. Row: sum the partial products, keep the own shard.

        The row's input must be contiguous: megatron's reduction leaves other tensors unreduced.
        """
        if self._tp == 1:
            return local
        if self._style == "column":
            return gather_from_sequence_parallel_region(local, tensor_parallel_output_grad=True, group=self._tp_group)
        return reduce_scatter_to_sequence_parallel_region(local.contiguous(), group=self._tp_group)

    def _route(self, z_TY: Tensor, logits_TAN: Tensor) -> tuple[Tensor, maths.Routing]:
        """Bring z and logits of all adapters across TP, as one float32 tensor A (d + N) wide, and route.

        The load-balancing loss is taken where every token is on one TP rank only: before the
        column gather, after the row reduce-scatter.
        """
        if self._tp > 1 and self._style == "row":
            z_TY, logits_TAN = self._cross_tp_together(z_TY, logits_TAN)
        routing = self._routing(logits_TAN)
        z_TY = self._attach_load_balancing(z_TY, routing)
        if self._tp > 1 and self._style == "column":
            z_TY, logits_TAN = self._cross_tp_together(z_TY, logits_TAN)
            routing = self._routing(logits_TAN)
        return z_TY, routing

    def _routing(self, logits_TAN: Tensor) -> maths.Routing:
        return maths.route(logits_TAN, self._spec.topk, self._spec.norm_topk_prob)

    def _cross_tp_together(self, z_TY: Tensor, logits_TAN: Tensor) -> tuple[Tensor, Tensor]:
        stack = self._cross_tp(torch.cat((z_TY.float(), logits_TAN.flatten(1)), dim=-1))
        z, logits = stack.split((z_TY.shape[-1], stack.shape[-1] - z_TY.shape[-1]), dim=-1)
        return z.to(z_TY.dtype), logits.unflatten(-1, logits_TAN.shape[1:])

    def _attach_load_balancing(self, z_TY: Tensor, routing: maths.Routing) -> Tensor:
        """z with the gradient of this microbatch's load-balancing losses attached; records statistics.

        f and p are summed over TP before their product, so that no layout changes the loss; the
        gradient of p stays on the rank that holds the token.
        """
        context, spec = self._settings.context, self._spec
        wants_loss = torch.is_grad_enabled() and spec.aux_loss_coeff > 0
        is_recording = context.recording and not (is_checkpointing() and torch.is_grad_enabled())  # not when recomputed
        if not (wants_loss or is_recording):
            return z_TY
        num_tokens, adapters, num_experts = routing.probs_TN.shape
        tasks_T = context.local_tasks(num_tokens, self._settings.topology.tp_rank, self._tp, z_TY.device)
        valid_T = (tasks_T > 0).float()
        first_TA1 = (
            torch.arange(adapters, device=z_TY.device) * (context.num_tasks + 1) + tasks_T.unsqueeze(1)
        ).unsqueeze(-1)
        slots = (first_TA1 * num_experts + routing.experts_TK).flatten()
        counts_AJN = torch.zeros(adapters * (context.num_tasks + 1) * num_experts, device=z_TY.device)
        counts_AJN.index_add_(0, slots, torch.ones_like(slots, dtype=torch.float32))
        counts_AJN = counts_AJN.view(adapters, -1, num_experts)

        sums = torch.stack((counts_AJN[:, 1:].sum(dim=1), (valid_T @ routing.probs_TN.flatten(1)).view(adapters, -1)))
        if self._tp > 1:
            sums = reduce_from_tensor_model_parallel_region(sums, group=self._tp_group)
        slots_AN, probs_AN = sums.unbind(0)
        aux_loss_A = maths.load_balancing_loss(spec, slots_AN.detach(), probs_AN)
        if is_recording:
            entropy_TA = -torch.xlogy(routing.probs_TN, routing.probs_TN).sum(dim=-1)
            entropy_A = (valid_T @ entropy_TA).detach()
            for i, adapter in enumerate(self._list):
                context.record(adapter.site, counts_AJN[i], entropy_A[i], aux_loss_A[i].detach())
        return MoEAuxLossAutoScaler.apply(z_TY, aux_loss_A.sum()) if wants_loss else z_TY

    # ---- the experts

    def _weight(self, parameter: torch.nn.Parameter) -> Tensor:
        """An expert parameter with all experts at hand: the shard, or the step's gathered copy."""
        return parameter if self._gathered is None else self._gathered.full(parameter)

    def _down(self, adapter: Adapter) -> Tensor:
        return self._weight(adapter.get_parameter("P" if self._spec.method == "malora" else "A"))

    def _ups(self, adapter: Adapter, run: Run) -> list[Tensor]:
        """B of each of a run's projections. [E, M, R], LoRA: [M, R]"""
        return [self._weight(adapter.up(projection)) for projection in run.projections]

    def _compute(self, adapter: Adapter, y: Tensor, tokens: DispatchedTokens, run: Run, columns: Columns) -> Tensor:
        """Add a run's part of the experts' outputs to these columns of y."""
        return add_experts(
            self._settings.expert_compute,
            y,
            tokens.rows_WZ,
            tokens.gates_WJ,
            tokens.experts_WJ,
            self._down(adapter),
            self._ups(adapter, run),
            self._spec.scaling,
            columns,
            run.groups,
        )

    def _send_input_across(self, x_TI: Tensor) -> list[Returning]:
        """MoLoRA under TP: x goes to the experts from where it is, their r-wide inner values cross TP.

        Column: a rank sends its sequence shard's x, and B's output shards need the inner values of
        all tokens. Row: a rank sends its features of all tokens, whose partial products by its
        shard of A_t are summed for the tokens of each sequence shard.
        """
        column, spec, dispatcher = self._style == "column", self._spec, self._dispatcher
        _, logits_TAN = self._project(x_TI)
        if not column:
            logits_TAN = self._cross_tp(logits_TAN.flatten(1)).unflatten(-1, logits_TAN.shape[1:])
        sent = self._routing(logits_TAN)
        x_TI = self._attach_load_balancing(x_TI, sent)
        # Gradients of the gates arise where the rows are: for a column on the shard's own rank, for a row on
        # every TP rank a part, which the gather's backward sums.
        gather = partial(gather_from_sequence_parallel_region, group=self._tp_group)
        if column:
            experts_TAK = gather(sent.experts_TK)
        else:
            sent = self._routing(gather(logits_TAN, tensor_parallel_output_grad=True))
            experts_TAK = sent.experts_TK
        routings = [maths.Routing(*(t[:, i] for t in sent)) for i in range(len(self))]
        arrived = dispatcher.dispatch([adapter.dropout(x_TI) for adapter in self._list], routings)
        returning = []
        for i, (adapter, runs, tokens) in enumerate(zip(self._list, self._runs, arrived, strict=True)):
            params = {"A": self._down(adapter)}
            gates_WE = maths.dense_gates(tokens.gates_WJ, tokens.experts_WJ, params["A"].shape[0])
            u_WU = maths.expert_down(spec, params, tokens.rows_WZ, gates_WE)
            cross = dispatcher.gather if column else dispatcher.reduce_scatter
            u_WU, tokens = cross(u_WU, tokens, experts_TAK[:, i], self._tp_group)
            up_EMR = stack_ups([stack_ups(self._ups(adapter, run), run.groups) for run in runs], groups=1)
            returning.append(dispatcher.send_back(maths.expert_up(up_EMR, u_WU), tokens))
        return returning

    # ---- the sum with the base output

    def _add_lora(self, z_TY: Tensor, y: Tensor) -> Tensor:
        for adapter, runs, z_TZ in zip(self._list, self._runs, z_TY.chunk(len(self), dim=-1), strict=True):
            for run in runs:
                up = stack_ups(self._ups(adapter, run), run.groups)
                y = add_up(y, z_TZ, up, self._spec.scaling, run.columns)
        return y

    def _add_local(self, tokens: Sequence[DispatchedTokens], y: Tensor) -> Tensor:
        for adapter, runs, own in zip(self._list, self._runs, tokens, strict=True):
            for run in runs:
                y = self._compute(adapter, y, own, run, run.columns)
        return y

    def _add_returned(self, returning: Sequence[Returning], y: Tensor) -> Tensor:
        for runs, wait in zip(self._runs, returning, strict=True):
            rows_SM, token_S = wait()
            parts = rows_SM.split([run.columns.total for run in runs], dim=-1)
            for part, run in zip(parts, runs, strict=True):
                y = add_rows(y, part, token_S, run.columns)
        return y

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
        linear: str,
        layer_number: int,
        widths: dict[str, tuple[int, int]],
        groups: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(input_size, output_size, **kwargs)
        self.adapters = LinearAdapters(settings, linear, layer_number, widths, "column", groups)

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        add = self.adapters.begin(input_)
        output, bias = super().forward(input_, *args, **kwargs)
        return add(output), bias

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
        linear: str,
        layer_number: int,
        widths: dict[str, tuple[int, int]],
        **kwargs: Any,
    ) -> None:
        super().__init__(input_size, output_size, **kwargs)
        self.adapters = LinearAdapters(settings, linear, layer_number, widths, "row", 1)

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """As RowParallelLinear.forward, which without TP returns a view that nothing may be added to in place."""
        add = self.adapters.begin(input_)
        output = F.linear(input_, self.weight)
        if self.sequence_parallel:
            output = reduce_scatter_to_sequence_parallel_region(output, group=self.tp_group)
        return add(output), None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: dict | None = None) -> dict:
        base = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return _with_adapter_shards(self, base, prefix, sharded_offsets, metadata)
