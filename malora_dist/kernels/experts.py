"""What comes after dispatch, arranged for speed: the chain up (down z) of methods/base.py.

Adapters add to the base linear's output in place, and autograd keeps z, gates and expert numbers: what is x-wide is
the linear's own input, what is N * R- or O-wide is computed again in backward. Tested in value and gradient against
methods/reference.py. Shape suffixes: see methods/base.py; "slot" is one (token, kept expert), sorted by expert;
"inner" are the values of all experts at hand side by side, E * R.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from malora_dist.kernels.columns import Columns, stack_rows, unstack_rows
from malora_dist.kernels.grouped import grouped_mm, grouped_outer, pad_last, padded_to, sorted_slots
from malora_dist.methods.routing import dense_gates

#: What moving one slot's rows costs, in inner values: see :func:`choose_expert_compute`.
SLOT_COST_CPU = 110
SLOT_COST_CUDA = 350


class Tokens(NamedTuple):
    """Projected tokens at their experts.

    Attributes:
        z_TD: may have no rows.
        gates_TK, experts_TK: gates of the experts at hand, zero for one that was not chosen, and which of those at
            hand they are, int64, none twice in a row; None for the methods without a router.
    """

    z_TD: Tensor
    gates_TK: Tensor | None
    experts_TK: Tensor | None


class ExpertWeights(NamedTuple):
    """Parameters of the experts at hand, scaled by s.

    Attributes:
        down: [E, R, D]; None: what is sent enters the up-projection as it is.
        ups: of each projection that the columns belong to, [E, O, R], or [O, R] without a router.
        blocks: see :func:`~malora_dist.kernels.columns.stack_rows`; of one projection it does not matter.
        scaling: s.
        kept: where the gated block keeps what it makes of narrower copies of them. Whoever gives it empties it
            when the parameters change; None: they are made anew, forward and backward.
    """

    down: Tensor | None
    ups: Sequence[Tensor]
    blocks: int
    scaling: float
    kept: dict[torch.dtype, _Matrices] | None = None


class _Matrices(NamedTuple):
    """P_cat [inner, D], or None, and B_cat^T [inner, O] in z's dtype: the experts one below the other."""

    down: Tensor | None
    up: Tensor


def choose_expert_compute(num_experts: int, slots: int, rank: int, device_type: str) -> str:
    """What ``expert_compute: auto`` means for one adapter: ``gated_block`` or ``grouped``.

    Per token and output column the gated block multiplies E * R inner values, the grouped form
    K * R, but it writes, reads and adds K rows, forward and backward, that the gated block never
    has. A moved row costs as much as C multiplied inner values, hence gated_block as long as

        E * R <= K * (R + C)

    C is about the median of what tools/benchmarks/step_time.py --forms found on two CPUs (37 to 189), and a
    guess from the FLOP rate and the bandwidth of an H100 on a GPU.

    Args:
        num_experts: E, experts at hand.
        slots: K, experts per token among them.
        rank: R, of one expert.
    """
    cost = SLOT_COST_CUDA if device_type == "cuda" else SLOT_COST_CPU
    return "gated_block" if num_experts * rank <= slots * (rank + cost) else "grouped"


def add_experts(expert_compute: str, y: Tensor, columns: Columns, tokens: Tokens, weights: ExpertWeights) -> Tensor:
    """The gate-weighted sum of the experts at hand, times s, added in place to the columns of y; returns y.

    With T = 0 every parameter still gets a (zero) gradient.

    Args:
        expert_compute: ``gated_block``, ``grouped``, or ``auto``: :func:`choose_expert_compute`. Both are traced
            whole by torch.compile, the grouped form in bfloat16 only.
        y: [..., output]; its gradient passes through unchanged, nothing of it is kept.

    Raises:
        KeyError: no such form.
    """
    if tokens.gates_TK is None or tokens.experts_TK is None:
        up = stack_rows(weights.ups, weights.blocks)
        return _AddUp.apply(y, tokens.z_TD, up, weights.scaling, columns)
    num_experts, _, rank = weights.ups[0].shape
    if expert_compute == "auto":
        expert_compute = choose_expert_compute(num_experts, tokens.experts_TK.shape[1], rank, tokens.z_TD.device.type)
        if torch.compiler.is_compiling() and tokens.z_TD.dtype != torch.bfloat16:
            expert_compute = "gated_block"  # torch.compile knows grouped_mm in bfloat16 only
    form = {"grouped": _Grouped, "gated_block": _GatedBlock}[expert_compute]
    how = _How(weights.scaling, columns, weights.blocks, weights.kept)
    return form.apply(y, *tokens, how, weights.down, *weights.ups)


class _How(NamedTuple):
    """What is no tensor in a call of the two forms."""

    scaling: float
    columns: Columns
    blocks: int
    kept: dict[torch.dtype, _Matrices] | None


def _add_product(y: Tensor, columns: Columns, inner: Tensor, up: Tensor) -> None:
    """y += inner up, on the columns."""
    target = columns.of(y)
    if target.dim() == 2:
        target.addmm_(inner, up)
    else:
        target.add_((inner @ up).view_as(target))


class _AddUp(torch.autograd.Function):
    """y += s z B^T."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, z_TR: Tensor, up_OR: Tensor, scaling: float, columns: Columns) -> Tensor:
        ctx.save_for_backward(z_TR, up_OR)
        ctx.scaling, ctx.columns = scaling, columns
        _add_product(y, columns, z_TR * scaling, up_OR.to(z_TR.dtype).t())
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z_TR, up_OR = ctx.saved_tensors
        dy_TO = ctx.columns.of(dy.contiguous()).flatten(1)
        dz = dy_TO @ (up_OR.to(z_TR.dtype) * ctx.scaling) if ctx.needs_input_grad[1] else None
        # [R, O] and then turned: on a CPU twice as fast as dy^T z
        d_up = ((z_TR * ctx.scaling).t() @ dy_TO).t().contiguous().to(up_OR.dtype) if ctx.needs_input_grad[2] else None
        return dy, dz, d_up, None, None


class _GatedBlock(torch.autograd.Function):
    """y += B_cat ((P_cat z) * repeat(s g, R)); gates are zero for experts not chosen."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        z_TD: Tensor,
        gates_TK: Tensor,
        experts_TK: Tensor,
        how: _How,
        down: Tensor | None,
        *ups: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(z_TD, gates_TK, experts_TK, down, *ups)
        ctx.how = how
        num_experts, _, rank = ups[0].shape
        matrices = _matrices(down, ups, how, z_TD.dtype)
        gates = _inner_gates((gates_TK * how.scaling).to(z_TD.dtype), experts_TK, num_experts, rank)
        _add_product(y, how.columns, _inner(z_TD, matrices, num_experts).mul_(gates), matrices.up)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z_TD, gates_TK, experts_TK, down, *ups = ctx.saved_tensors
        _, wants_z, wants_gates, _, _, wants_down, *wants_ups = ctx.needs_input_grad
        how: _How = ctx.how
        num_experts, _, rank = ups[0].shape
        matrices = _matrices(down, ups, how, z_TD.dtype)
        dy_TO = how.columns.of(dy.contiguous()).flatten(1)
        gates = _inner_gates((gates_TK * how.scaling).to(z_TD.dtype), experts_TK, num_experts, rank)
        inner = _inner(z_TD, matrices, num_experts)
        d_ups: Sequence[Tensor | None] = [None] * len(ups)
        if any(wants_ups):
            d_up = ((inner * gates).t() @ dy_TO).view(num_experts, rank, -1).transpose(1, 2).to(ups[0].dtype)
            d_ups = unstack_rows(d_up, ups, how.blocks)
        d_inner = dy_TO @ matrices.up.t()  # of the gated ones, so far
        d_gates = None
        if wants_gates:
            d_gates_TE = (d_inner * inner).view(-1, num_experts, rank).sum(dim=-1, dtype=gates_TK.dtype)
            d_gates = d_gates_TE.gather(1, experts_TK) * how.scaling
        d_inner *= gates
        dz = d_down = None
        if down is None or matrices.down is None:
            dz = d_inner.view(-1, num_experts, rank).sum(dim=1) if wants_z else None
        else:
            d_down = (d_inner.t() @ z_TD).view_as(down).to(down.dtype) if wants_down else None
            dz = d_inner @ matrices.down if wants_z else None
        return dy, dz, d_gates, None, None, d_down, *d_ups


def _matrices(down: Tensor | None, ups: Sequence[Tensor], how: _How, dtype: torch.dtype) -> _Matrices:
    """The parameters as the gated block multiplies them; kept where that is asked for and they are a narrow copy."""
    if how.kept is not None and dtype in how.kept:
        return how.kept[dtype]
    up_EOR = stack_rows(ups, how.blocks)
    turned = up_EOR.new_empty(up_EOR.shape[0], up_EOR.shape[2], up_EOR.shape[1], dtype=dtype)
    turned.copy_(up_EOR.transpose(1, 2))  # cast in the same pass
    matrices = _Matrices(None if down is None else down.to(dtype).flatten(0, 1), turned.flatten(0, 1))
    if how.kept is not None and dtype.itemsize < up_EOR.dtype.itemsize:
        how.kept[dtype] = matrices
    return matrices


def _inner_gates(gates_TK: Tensor, experts_TK: Tensor, num_experts: int, rank: int) -> Tensor:
    """The gate of each inner value, zero for experts not chosen. [T, inner]

    Written out: a CPU multiplies by one number per R values many times as slowly as value by value.
    """
    gates_TE1 = dense_gates(gates_TK, experts_TK, num_experts).unsqueeze(-1)
    return gates_TE1.expand(-1, -1, rank).flatten(1)


def _inner(z_TD: Tensor, matrices: _Matrices, num_experts: int) -> Tensor:
    """P_e z of all experts at hand side by side; without a down-projection z itself for each. [T, inner]"""
    return z_TD.repeat(1, num_experts) if matrices.down is None else F.linear(z_TD, matrices.down)


class _Grouped(torch.autograd.Function):
    """y[token of slot] += s g B_e P_e z[token of slot], slots sorted by expert, one GEMM per expert."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        z_TD: Tensor,
        gates_TK: Tensor,
        experts_TK: Tensor,
        how: _How,
        down: Tensor | None,
        *ups: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(z_TD, gates_TK, experts_TK, down, *ups)
        ctx.how = how
        up_EOR = stack_rows(ups, how.blocks)
        token_of_slot, order, ends_E = sorted_slots(experts_TK, up_EOR.shape[0])
        z_TD, down, up_EOR = _padded(z_TD, down, up_EOR)
        gates = (gates_TK.flatten()[order] * how.scaling).to(z_TD.dtype).unsqueeze(-1)
        inner = z_TD[token_of_slot]
        if down is not None:
            inner = grouped_mm(inner, down.transpose(1, 2), ends_E)
        rows = grouped_mm(inner * gates, up_EOR.transpose(1, 2), ends_E)
        target = how.columns.of(y)
        target.index_add_(0, token_of_slot, rows.view(-1, *target.shape[1:]))
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z_TD, gates_TK, experts_TK, down, *ups = ctx.saved_tensors
        _, wants_z, wants_gates, _, _, wants_down, *wants_ups = ctx.needs_input_grad
        up_EOR = stack_rows(ups, ctx.how.blocks)
        rank, width = up_EOR.shape[2], z_TD.shape[1]
        kinds = None if down is None else down.dtype, up_EOR.dtype
        token_of_slot, order, ends_E = sorted_slots(experts_TK, up_EOR.shape[0])
        z_TD, down, up_EOR = _padded(z_TD, down, up_EOR)
        gates = (gates_TK.flatten()[order] * ctx.how.scaling).to(z_TD.dtype).unsqueeze(-1)
        d_rows = ctx.how.columns.of(dy.contiguous())[token_of_slot].flatten(1)
        z_of_slot = z_TD[token_of_slot]
        inner = z_of_slot if down is None else grouped_mm(z_of_slot, down.transpose(1, 2), ends_E)
        d_ups: Sequence[Tensor | None] = [None] * len(ups)
        if any(wants_ups):
            d_up = grouped_outer(d_rows, inner * gates, ends_E)[..., :rank].contiguous().to(kinds[1])
            d_ups = unstack_rows(d_up, ups, ctx.how.blocks)
        d_gated = grouped_mm(d_rows, up_EOR, ends_E)
        d_gates = None
        if wants_gates:
            by_slot = (d_gated * inner).sum(dim=-1, dtype=gates_TK.dtype) * ctx.how.scaling
            d_gates = torch.empty_like(by_slot).index_copy_(0, order, by_slot).view_as(gates_TK)
        d_inner = d_gated * gates
        dz = d_down = None
        if down is not None and wants_down:
            d_down = grouped_outer(d_inner, z_of_slot, ends_E)[:, :rank, :width].contiguous().to(kinds[0])
        if wants_z:
            d_slots = d_inner if down is None else grouped_mm(d_inner, down, ends_E)
            # contiguous: the gradient goes on to code that is not ours (megatron's and FastMoE's collectives)
            dz = torch.zeros_like(z_TD).index_add_(0, token_of_slot, d_slots)[:, :width].contiguous()
        return dy, dz, d_gates, None, None, d_down, *d_ups


def _padded(z_TD: Tensor, down: Tensor | None, up_EOR: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """All in z's dtype, D and R padded with zeros to the 16 bytes that grouped_mm's strides have to be multiples of."""
    more_d, more_r = padded_to(z_TD.shape[1], z_TD.dtype), padded_to(up_EOR.shape[2], z_TD.dtype)
    if down is not None:
        down = F.pad(down.to(z_TD.dtype), (0, more_d, 0, more_r))
    return F.pad(z_TD, (0, more_d)), down, pad_last(up_EOR.to(z_TD.dtype), more_r)


class _AddRows(torch.autograd.Function):
    """y[token of row] += row."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, rows: Tensor, token_of_row: Tensor, columns: Columns) -> Tensor:
        ctx.save_for_backward(token_of_row)
        ctx.columns = columns
        target = columns.of(y)
        target.index_add_(0, token_of_row, rows.view(-1, *target.shape[1:]))
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (token_of_row,) = ctx.saved_tensors
        return dy, ctx.columns.of(dy.contiguous())[token_of_row].flatten(1), None, None


def add_rows(y: Tensor, rows: Tensor, token_of_row: Tensor, columns: Columns) -> Tensor:
    """Add rows that came back from other ranks in place to the columns of y, at their tokens; returns y."""
    return _AddRows.apply(y, rows, token_of_row, columns)
