"""All adapters beside one of megatron's linears: what runs before, beside and after its GEMM.

One adapter per Hugging Face projection, also inside megatron's fused qkv and fc1; with
``fuse_projections`` one per fused linear, in which only what has an ``out`` axis is the projection's own.
All adapters of a linear read its input once, cross TP and are dispatched together, and add their
outputs to its output in place. Shape suffixes: see methods/base.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from malora_dist.exchange.base import Dispatched, Returning
from malora_dist.kernels.columns import Columns, Span, columns_of, consecutive, spans_of
from malora_dist.kernels.experts import ExpertWeights, Tokens, add_experts, add_rows
from malora_dist.kernels.project import project_and_score
from malora_dist.layers.adapter import Adapter, AdapterSettings
from malora_dist.layers.balance import attach_load_balancing
from malora_dist.layers.crossing import Crossing
from malora_dist.methods.base import Style
from malora_dist.methods.reference import sum_over_experts
from malora_dist.methods.routing import Routing, dense_gates, route

#: Adds the adapters' outputs to the base linear's, in place where the method allows.
Add = Callable[[Tensor], Tensor]


class LinearAdapters(torch.nn.ModuleDict):
    """The adapters beside one of megatron's linears, by name.

    Args:
        linear: megatron's name of the linear.
        layer_number: 0-based, in the whole model.
        widths: full (in, out) widths of every projection fused into the linear, in fused order,
            those without an adapter included.
        blocks: qkv is interleaved by query group ([q heads | k | v] in each), in full so many over
            all TP ranks; other linears have 1.
    """

    def __init__(
        self,
        settings: AdapterSettings,
        linear: str,
        layer_number: int,
        widths: dict[str, tuple[int, int]],
        style: Style,
        blocks: int,
    ) -> None:
        super().__init__(
            {
                name: Adapter(
                    settings,
                    layer_number,
                    name,
                    widths[projections[0]][0],
                    {projection: widths[projection][1] for projection in projections},
                    style,
                )
                for name, projections in settings.spec.adapters
                if projections[0] in widths
            }
        )
        self._settings, self._method, self._style = settings, settings.spec.declared, style
        self._crossing = Crossing(style, settings.topology.tp_group)
        self._exchange = settings.plan.exchanges[linear]
        self._exchange.add(layer_number, [p for adapter in self._list for p in adapter.expert_parameters])
        self._columns = columns_of(widths, blocks, self._crossing.size if style == "column" else 1)
        self._spans = [spans_of(adapter.projections, self._columns) for adapter in self._list]
        self._kept_in_step, self._kept_of = -1, dict[torch.nn.Parameter, dict[torch.dtype, Any]]()
        self._norms: dict[str, tuple[int, Tensor]] = {}  # {projection: (step it was computed in, squared norms)}

    @property
    def _list(self) -> list[Adapter]:
        return list(self.values())  # type: ignore[arg-type]

    def begin(self, x: Tensor, weight_OI: Tensor) -> Add:
        """Everything that comes before the sum: projection, routing, dispatch, and the start of the way back.

        The base linear runs between this and the call of what it returns: rows on their way back,
        as wide as the output, travel behind it.

        Args:
            x: the linear's input on this rank, [s, b, n].
            weight_OI: its frozen weight on this rank.

        Returns:
            the function that adds all adapters' outputs to the base output [s, b, m] of this rank.
        """
        with self.region("project"):
            projected = self._project(x.flatten(0, 1))
        with self.region("route"):
            z, routings = self._route(*projected)
        if routings is None:
            dispatched = [Dispatched(Tokens(z_TD, None, None), handle=None) for z_TD in z]
        else:
            with self.region("dispatch"):
                dispatched = self._exchange.dispatch(z, routings)
        if routings is None or not self._exchange.moves_tokens:
            add = partial(self._add_local, dispatched)
        else:
            with self.region("experts"):
                returning = [
                    self._exchange.send_back(self._rows(adapter, spans, arrived.tokens), arrived)
                    for adapter, spans, arrived in zip(self._list, self._spans, dispatched, strict=True)
                ]
            add = partial(self._add_returned, returning)
        if not self._method.has_output():
            return add
        return lambda y: self._output(add(y), weight_OI)

    def region(self, name: str) -> AbstractContextManager[object]:
        """See :meth:`RoutingContext.region`."""
        return self._settings.context.region(name)

    # ---- before the experts

    def _project(self, x_TI: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """(z of each adapter, logits of all [T, adapters, N], None without a router) of this rank's part of x."""
        method, adapters = self._method, self._list
        drops = self.training and self._settings.spec.lora_dropout > 0
        chain = method.chain
        shared = None
        if chain is not None and chain.project is not None and not drops:
            shared = torch.cat([adapter.get_parameter(chain.project) for adapter in adapters])
        if not method.is_mixture():
            if shared is not None:
                return list(F.linear(x_TI, shared.to(x_TI.dtype)).chunk(len(adapters), dim=-1)), None
            return self._project_each(x_TI), None
        router = torch.cat([adapter.get_parameter("router") for adapter in adapters])
        if shared is not None:
            z, logits = project_and_score(x_TI, shared, router)
            parts = list(z.chunk(len(adapters), dim=-1))
        else:
            parts = self._project_each(x_TI)
            logits = project_and_score(x_TI, router.new_empty(0, x_TI.shape[1]), router)[1]
        return parts, logits.view(-1, len(adapters), method.num_experts)

    def _project_each(self, x_TI: Tensor) -> list[Tensor]:
        """Each adapter's own projection of its own dropout of x."""
        parts = []
        for adapter in self._list:
            p = self._method.before_dispatch(dict(adapter.named_parameters(recurse=False)), x_TI.dtype)
            parts.append(self._method.project(p, adapter.dropout(x_TI)))
        return parts

    def _route(self, z: list[Tensor], logits: Tensor | None) -> tuple[list[Tensor], list[Routing] | None]:
        """Bring z and logits of all adapters to where the outputs are made, and route.

        The load-balancing loss is taken where every token is on one TP rank only: before the
        column gather, after the row reduce-scatter.
        """
        if logits is None:
            return self._cross(z, None)[0], None
        if self._style == "column" and self._crossing.size > 1:
            z, logits = self._cross(z, self._balanced(logits, self._routing(logits)))
            routing = self._routing(logits)
        else:
            z, logits = self._cross(z, logits)
            routing = self._routing(logits)
            routing = routing._replace(gates_TK=self._balanced(routing.gates_TK, routing))
        return z, [Routing(*parts) for parts in zip(*(t.unbind(1) for t in routing), strict=True)]

    def _balanced(self, carrier: Tensor, routing: Routing) -> Tensor:
        """The carrier with the load-balancing losses of this routing attached."""
        sites = [adapter.site for adapter in self._list]
        context = self._settings.context
        return attach_load_balancing(carrier, routing, self._method, context, self._crossing, sites)

    def _routing(self, logits: Tensor | None) -> Routing:
        assert logits is not None, "of a method with a router"
        spec = self._settings.spec
        return route(logits, spec.topk, spec.norm_topk_prob)

    def _cross(self, z: list[Tensor], logits: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
        """Across TP: products with x as one float32 tensor, adapters * (D + N) wide; x itself by itself."""
        if self._crossing.size == 1:
            return z, logits
        if self._method.sent == "in":
            assert logits is not None, "x is sent to experts, which a router chooses"
            crossed = self._crossing.projected(logits.flatten(1)).unflatten(-1, logits.shape[1:])
            first = self._crossing.unprojected(z[0])  # without dropout x itself, for all adapters
            return [first if x_TI is z[0] else self._crossing.unprojected(x_TI) for x_TI in z], crossed
        parts = [z_TD.float() for z_TD in z] + ([] if logits is None else [logits.flatten(1)])
        whole = self._crossing.projected(torch.cat(parts, dim=-1))
        *crossed, last = whole.split([part.shape[-1] for part in parts], dim=-1)
        if logits is None:
            crossed.append(last)
        sent = [part.to(z_TD.dtype) for part, z_TD in zip(crossed, z, strict=True)]
        return sent, None if logits is None else last.unflatten(-1, logits.shape[1:])

    # ---- the experts

    def _weight(self, name: str, parameter: torch.nn.Parameter) -> Tensor:
        """A parameter as its experts need it: with all experts at hand, and with its whole input axis."""
        param = self._method.parameters[name]
        if not param.is_expert:
            return parameter
        weight = self._exchange.weights(parameter)
        if self._style == "row" and "in" in param.axes:
            return self._crossing.whole_input(weight, param.axes.index("in"))
        return weight

    def _weights(self, adapter: Adapter, span: Span) -> ExpertWeights:
        """Of the chain, for the projections of a span."""
        chain = self._method.chain
        assert chain is not None, "asked for by methods with a chain"
        by_projection = [adapter.parameters_of(projection) for projection in span.projections]
        down = None if chain.down is None else self._weight(chain.down, by_projection[0][chain.down])
        ups = [self._weight(chain.up, parameters[chain.up]) for parameters in by_projection]
        return ExpertWeights(down, ups, span.blocks, self._method.scaling, self._kept(by_projection[0][chain.up]))

    def _kept(self, first_up: torch.nn.Parameter) -> dict[torch.dtype, Any]:
        """What the kernel keeps of a span's weights through a step: they change between steps only."""
        step = self._settings.plan.steps
        if self._kept_in_step != step:
            self._kept_in_step, self._kept_of = step, {}
        return self._kept_of.setdefault(first_up, {})

    def _add_chain(self, adapter: Adapter, span: Span, y: Tensor, columns: Columns, tokens: Tokens) -> Tensor:
        return add_experts(self._settings.expert_compute, y, columns, tokens, self._weights(adapter, span))

    def _acting(self, adapter: Adapter, projection: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """All parameters that act on a projection, as its experts need them."""
        parameters = adapter.parameters_of(projection)
        return {name: self._weight(name, parameter).to(dtype) for name, parameter in parameters.items()}

    def _sums(self, adapter: Adapter, tokens: Tokens) -> list[Tensor]:
        """Gate-weighted sums by the method's own functions: one for each projection, or one that all share."""
        method = self._method
        projections = adapter.projections if method.returned == "out" else adapter.projections[:1]
        sums = []
        for projection in projections:
            p = self._acting(adapter, projection, tokens.z_TD.dtype)
            if tokens.gates_TK is None or tokens.experts_TK is None:
                sums.append(method.expert(p, tokens.z_TD))
            else:
                at_hand = next(p[name].shape[0] for name, param in method.parameters.items() if param.is_expert)
                gates_TE = dense_gates(tokens.gates_TK, tokens.experts_TK, at_hand)
                sums.append(sum_over_experts(method, p, tokens.z_TD, gates_TE))
        return sums

    def _rows(self, adapter: Adapter, spans: Sequence[Span], tokens: Tokens) -> Tensor:
        """What goes back to the tokens of other ranks: one after the other what each projection gets."""
        if self._method.chain is None:
            return torch.cat(self._sums(adapter, tokens), dim=-1)
        rows = tokens.z_TD.new_zeros(tokens.z_TD.shape[0], sum(span.columns.total for span in spans))
        for span, columns in zip(spans, consecutive(spans), strict=True):
            rows = self._add_chain(adapter, span, rows, columns, tokens)
        return rows

    # ---- the sum with the base output

    def _add_local(self, dispatched: Sequence[Dispatched], y: Tensor) -> Tensor:
        with self.region("experts"):
            for adapter, spans, (tokens, _) in zip(self._list, self._spans, dispatched, strict=True):
                if self._method.chain is None:
                    y = self._add_sums(adapter, self._sums(adapter, tokens), y)
                else:
                    for span in spans:
                        y = self._add_chain(adapter, span, y, span.columns, tokens)
        return y

    def _add_returned(self, returning: Sequence[Returning], y: Tensor) -> Tensor:
        with self.region("combine"):
            for adapter, spans, wait in zip(self._list, self._spans, returning, strict=True):
                rows, token_of_row = wait()
                if self._method.chain is None:
                    sums = rows.new_zeros(y.numel() // y.shape[-1], rows.shape[1]).index_add(0, token_of_row, rows)
                    y = self._add_sums(adapter, sums.split(self._returned_widths(adapter), dim=-1), y)
                else:
                    parts = rows.split([span.columns.total for span in spans], dim=-1)
                    for part, span in zip(parts, spans, strict=True):
                        y = add_rows(y, part, token_of_row, span.columns)
        return y

    def _returned_widths(self, adapter: Adapter) -> list[int]:
        if self._method.returned != "out":
            return [self._method.widths(0, 0)[self._method.returned]]
        return [self._columns[projection].total for projection in adapter.projections]

    def _add_sums(self, adapter: Adapter, sums: Sequence[Tensor], y: Tensor) -> Tensor:
        """Add what :meth:`_sums` made, at home, through ``Method.combine``."""
        shared = sums if len(sums) > 1 else [sums[0]] * len(adapter.projections)
        for projection, v in zip(adapter.projections, shared, strict=True):
            p = {
                name: parameter.to(v.dtype)
                for name, parameter in adapter.parameters_of(projection).items()
                if not self._method.parameters[name].is_expert
            }
            delta = self._method.combine(p, v) * self._method.scaling
            target = self._columns[projection].of(y)
            target.add_(delta.view_as(target))
        return y

    # ---- methods that scale the sum by norms of the weight

    def _output(self, y: Tensor, weight_OI: Tensor) -> Tensor:
        """``Method.output`` of every adapted projection; the columns of the others stay as they are."""
        adapter_of = {projection: adapter for adapter in self._list for projection in adapter.projections}
        parts = []
        for projection, columns in self._columns.items():
            part = columns.of(y)
            if projection in adapter_of:
                adapter = adapter_of[projection]
                needs_norms = self._method.needs_norms()
                norms = self._squared_norms(adapter, projection, weight_OI) if needs_norms else None
                part = self._method.output(adapter.parameters_of(projection), part.flatten(1), norms).view_as(part)
            parts.append(part)
        return torch.cat(parts, dim=-1).view_as(y)

    @torch.no_grad()
    def _squared_norms(self, adapter: Adapter, projection: str, weight_OI: Tensor) -> Tensor:
        """``Method.squared_norms`` of a projection, computed once per step: weights change between steps only."""
        step, known = self._norms.get(projection, (-1, None))
        if known is not None and step == self._settings.plan.steps:
            return known
        parameters = adapter.parameters_of(projection)
        columns = self._columns[projection]
        parts = []
        for block, weight in enumerate(weight_OI.unflatten(0, (columns.blocks, -1))):
            rows = slice(block * columns.width, (block + 1) * columns.width)
            own = {
                name: parameter[rows] if "out" in self._method.parameters[name].axes else parameter
                for name, parameter in parameters.items()
            }
            share = self._method.squared_norms(own, weight[columns.start : columns.start + columns.width])
            assert share is not None, "of a method that needs norms"
            parts.append(share)
        norms = self._crossing.summed_over_input(torch.cat(parts))
        self._norms[projection] = self._settings.plan.steps, norms
        return norms

    @torch.no_grad()
    def start_from_base(self, weight_OI: Tensor) -> None:
        """Fill the parameters that start from the norms of the base weight, once that is loaded."""
        for adapter in self._list:
            for projection in adapter.projections:
                for name, parameter in adapter.parameters_of(projection).items():
                    if self._method.parameters[name].from_norms:
                        parameter.copy_(self._squared_norms(adapter, projection, weight_OI).sqrt())
        self._norms.clear()  # of no step

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Sequence[tuple[int, int, int]] = (), metadata: dict | None = None
    ) -> dict[str, ShardedTensor]:
        sharded: dict[str, ShardedTensor] = {}
        for name, adapter in self.items():
            assert isinstance(adapter, Adapter)
            sharded.update(adapter.sharded_state_dict(f"{prefix}{name}.", sharded_offsets, metadata))
        return sharded
