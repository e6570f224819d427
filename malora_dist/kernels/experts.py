"""The maths of maths.py, arranged for speed: what training runs, tested against it in value and gradient.

Adapters add to the base linear's output in place, and autograd keeps z, gates and expert numbers: what
is x-wide is the linear's own input, what is N * R- or M-wide is computed again in backward.

Shape suffixes as in maths.py, and: S slots, one per (token, kept expert), sorted by expert;
U all inner values of the experts at hand, E * R; F width of the base linear's output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

#: What moving one slot's rows costs, in inner values: see :func:`choose_expert_compute`.
SLOT_COST_CPU = 110
SLOT_COST_CUDA = 350


class Columns(NamedTuple):
    """The columns of a fused linear's output that belong to one projection.

    Attributes:
        groups: the output consists of so many equal parts (query groups of qkv, else 1),
        start, width: and in each of them the projection has `width` columns from `start` on.
    """

    groups: int
    start: int
    width: int

    @property
    def total(self) -> int:
        """Columns in all groups together."""
        return self.groups * self.width

    def of(self, y: Tensor) -> Tensor:
        """A view of y [..., F] as [T, width], or [T, groups, width] where there are several."""
        y_TF = y.view(-1, y.shape[-1])
        if self.groups == 1:
            return y_TF[:, self.start : self.start + self.width]
        y_TGF = y_TF.view(y_TF.shape[0], self.groups, y.shape[-1] // self.groups)
        return y_TGF[..., self.start : self.start + self.width]


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


# ---- before dispatch


def _bf16_parts(wide: Tensor) -> list[Tensor]:
    """Three bfloat16 tensors whose sum is a float32 one, bit by bit: 3 x 8 bits of mantissa."""
    parts = []
    for _ in range(3):
        parts.append(wide.bfloat16())
        wide = wide - parts[-1].float()
    return parts


def _matmul_float32(a: Tensor, b: Tensor) -> Tensor:
    """The product of bfloat16 matrices in float32. Neither a CPU nor torch.compile knows the kernel."""
    if a.is_cuda and not torch.compiler.is_compiling():
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


class _Project(torch.autograd.Function):
    """z = x S^T in x's dtype and logits = x R^T in float32, in one product that reads x once, in its own dtype.

    On a GPU a bfloat16 x is never copied to float32: R is split into three bfloat16 matrices, whose products with x,
    summed in float32, are as exact and run on tensor cores. Only dx, bfloat16 itself, takes the gradient of the logits
    in bfloat16.
    """

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, down_ZI: Tensor, router_NI: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x_TI, down_ZI, router_NI)
        width, experts = down_ZI.shape[0], router_NI.shape[0]
        if x_TI.dtype == torch.bfloat16:
            stacked = torch.cat((down_ZI.bfloat16(), *_bf16_parts(router_NI)))
            z_TZ, parts = _matmul_float32(x_TI, stacked.t()).split((width, 3 * experts), dim=-1)
            return z_TZ.bfloat16(), parts.unflatten(-1, (3, experts)).sum(dim=1)
        both = F.linear(x_TI.to(router_NI.dtype), torch.cat((down_ZI.to(router_NI.dtype), router_NI)))
        z_TZ, logits_TN = both.split((width, experts), dim=-1)
        return z_TZ.to(x_TI.dtype).contiguous(), logits_TN.contiguous()

    @staticmethod
    def backward(ctx: Any, dz_TZ: Tensor, dlogits_TN: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x_TI, down_ZI, router_NI = ctx.saved_tensors
        width, experts = down_ZI.shape[0], router_NI.shape[0]
        dx = d_down = d_router = None
        in_bf16 = x_TI.dtype == torch.bfloat16
        dtype = x_TI.dtype if in_bf16 else router_NI.dtype
        if ctx.needs_input_grad[0]:
            factor = torch.cat((down_ZI.to(dtype), router_NI.to(dtype)))
            dx = (torch.cat((dz_TZ.to(dtype), dlogits_TN.to(dtype)), dim=-1) @ factor).to(x_TI.dtype)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            if in_bf16:
                grad = torch.cat((dz_TZ, *_bf16_parts(dlogits_TN)), dim=-1)
                d_down, parts = _matmul_float32(grad.t(), x_TI).split((width, 3 * experts))
                d_router = parts.unflatten(0, (3, experts)).sum(dim=0)
            else:
                grad = torch.cat((dz_TZ.to(dtype), dlogits_TN), dim=-1)
                d_down, d_router = (grad.t() @ x_TI.to(dtype)).split((width, experts))
            d_down = d_down.to(down_ZI.dtype)
        return dx, d_down, d_router


def project_and_score(x_TI: Tensor, down_ZI: Tensor, router_NI: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`maths.project` and :func:`maths.router_logits` of the same x, for any number of adapters stacked.

    Returns:
        z [T, Z] in x's dtype, and the logits [T, N] in float32 (or wider).
    """
    wide = torch.promote_types(x_TI.dtype, torch.float32)
    return _Project.apply(x_TI, down_ZI, router_NI.to(wide))


# ---- after dispatch


def _add_product(y: Tensor, columns: Columns, u_TU: Tensor, up_UM: Tensor) -> None:
    """y += u up, on the projection's columns."""
    target = columns.of(y)
    if target.dim() == 2:
        target.addmm_(u_TU, up_UM)
    else:
        target.add_((u_TU @ up_UM).view_as(target))


def _columns_of_grad(columns: Columns, dy: Tensor) -> Tensor:
    """The gradient of the projection's output. [T, M]"""
    return columns.of(dy.contiguous()).flatten(1)


class _AddUp(torch.autograd.Function):
    """y += s z B^T."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, z_TR: Tensor, up_MR: Tensor, scaling: float, columns: Columns) -> Tensor:
        ctx.save_for_backward(z_TR, up_MR)
        ctx.scaling, ctx.columns = scaling, columns
        _add_product(y, columns, z_TR * scaling, up_MR.to(z_TR.dtype).t())
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z_TR, up_MR = ctx.saved_tensors
        dy_TM = _columns_of_grad(ctx.columns, dy)
        dz = dy_TM @ (up_MR.to(z_TR.dtype) * ctx.scaling) if ctx.needs_input_grad[1] else None
        # [R, M] and then turned: on a CPU twice as fast as dy^T z
        d_up = ((z_TR * ctx.scaling).t() @ dy_TM).t().to(up_MR.dtype) if ctx.needs_input_grad[2] else None
        return dy, dz, d_up, None, None


def add_up(y: Tensor, z_TR: Tensor, up_MR: Tensor, scaling: float, columns: Columns) -> Tensor:
    """LoRA's way up, s B z, added in place to the columns of the base output y [..., F]; returns y."""
    return _AddUp.apply(y, z_TR, up_MR, scaling, columns)


class _GatedBlock(torch.autograd.Function):
    """y += B_cat ((P_cat z) * repeat(s g, R)); gates are zero for experts not chosen."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        z_TZ: Tensor,
        gates_TK: Tensor,
        experts_TK: Tensor,
        down_ERZ: Tensor,
        scaling: float,
        columns: Columns,
        groups: int,
        *ups_EMR: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(z_TZ, gates_TK, experts_TK, down_ERZ, *ups_EMR)
        ctx.scaling, ctx.columns, ctx.groups = scaling, columns, groups
        up_EMR = stack_ups(ups_EMR, groups)
        gates_TE1 = _gate_block(z_TZ, gates_TK, experts_TK, down_ERZ.shape[0], scaling)
        u_TER = F.linear(z_TZ, down_ERZ.to(z_TZ.dtype).flatten(0, 1)).view(-1, *down_ERZ.shape[:2]) * gates_TE1
        _add_product(y, columns, u_TER.flatten(1), _stacked_up(up_EMR, z_TZ.dtype))
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z_TZ, gates_TK, experts_TK, down_ERZ, *ups_EMR = ctx.saved_tensors
        up_EMR = stack_ups(ups_EMR, ctx.groups)
        num_experts, rank, _ = down_ERZ.shape
        down_UZ = down_ERZ.to(z_TZ.dtype).flatten(0, 1)
        dy_TM = _columns_of_grad(ctx.columns, dy)
        gates_TE1 = _gate_block(z_TZ, gates_TK, experts_TK, num_experts, ctx.scaling)
        inner_TER = F.linear(z_TZ, down_UZ).view(-1, num_experts, rank)
        u_TU = (inner_TER * gates_TE1).flatten(1)
        d_up = (u_TU.t() @ dy_TM).view(num_experts, rank, -1).transpose(1, 2).to(up_EMR.dtype)
        du_TER = (dy_TM @ _stacked_up(up_EMR, z_TZ.dtype).t()).view(-1, num_experts, rank)
        d_dense_TE = (du_TER * inner_TER).sum(dim=-1, dtype=gates_TK.dtype)
        d_gates = d_dense_TE.gather(1, experts_TK) * ctx.scaling
        d_inner_TU = (du_TER * gates_TE1).flatten(1)
        d_down = (d_inner_TU.t() @ z_TZ).view_as(down_ERZ).to(down_ERZ.dtype)
        dz = d_inner_TU @ down_UZ if ctx.needs_input_grad[1] else None
        return dy, dz, d_gates, None, d_down, None, None, None, *_unstacked(d_up, ups_EMR, ctx.groups)


def stack_ups(ups_EMR: Sequence[Tensor], groups: int) -> Tensor:
    """B of several projections, [E, M, R] or [M, R] each, as one whose rows are in the order of a fused output.

    Args:
        groups: equal parts of the output, in each of which the projections lie one after the other.
    """
    if len(ups_EMR) == 1:
        return ups_EMR[0]
    return torch.cat([up.unflatten(-2, (groups, -1)) for up in ups_EMR], dim=-2).flatten(-3, -2)


def _unstacked(d_up_EMR: Tensor, ups_EMR: Sequence[Tensor], groups: int) -> list[Tensor]:
    """The inverse, of the gradient."""
    if len(ups_EMR) == 1:
        return [d_up_EMR]
    parts = d_up_EMR.unflatten(-2, (groups, -1)).split([up.shape[-2] // groups for up in ups_EMR], dim=-2)
    return [part.flatten(-3, -2) for part in parts]


def _gate_block(z_TZ: Tensor, gates_TK: Tensor, experts_TK: Tensor, num_experts: int, scaling: float) -> Tensor:
    """s g as [T, E, 1] in z's dtype, zero for experts not chosen."""
    none_TE = gates_TK.new_zeros(gates_TK.shape[0], num_experts)
    return none_TE.scatter(1, experts_TK, gates_TK * scaling).to(z_TZ.dtype).unsqueeze(-1)


def _stacked_up(up_EMR: Tensor, dtype: torch.dtype) -> Tensor:
    """B_cat^T, the experts one below the other. [U, M]"""
    return up_EMR.to(dtype).transpose(1, 2).flatten(0, 1)


class _Grouped(torch.autograd.Function):
    """y[token of slot] += s g B_e P_e z[token of slot], slots sorted by expert, one GEMM per expert."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        z_TZ: Tensor,
        gates_TK: Tensor,
        experts_TK: Tensor,
        down_ERZ: Tensor,
        scaling: float,
        columns: Columns,
        groups: int,
        *ups_EMR: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(z_TZ, gates_TK, experts_TK, down_ERZ, *ups_EMR)
        ctx.scaling, ctx.columns, ctx.groups = scaling, columns, groups
        up_EMR = stack_ups(ups_EMR, groups)
        token_S, order_S, ends_E = sorted_slots(experts_TK, down_ERZ.shape[0])
        z_TZ, down_ERZ, up_EMR = _padded(z_TZ, down_ERZ, up_EMR)
        gates_S1 = (gates_TK.flatten()[order_S] * scaling).to(z_TZ.dtype).unsqueeze(-1)
        u_SR = _grouped_mm(z_TZ[token_S], down_ERZ.transpose(1, 2), ends_E) * gates_S1
        rows_SM = _grouped_mm(u_SR, up_EMR.transpose(1, 2), ends_E)
        target = columns.of(y)
        target.index_add_(0, token_S, rows_SM.view(-1, *target.shape[1:]))
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z_TZ, gates_TK, experts_TK, down_ERZ, *ups_EMR = ctx.saved_tensors
        up_EMR = stack_ups(ups_EMR, ctx.groups)
        _, rank, width = down_ERZ.shape
        kinds = down_ERZ.dtype, up_EMR.dtype
        token_S, order_S, ends_E = sorted_slots(experts_TK, down_ERZ.shape[0])
        z_TZ, down_ERZ, up_EMR = _padded(z_TZ, down_ERZ, up_EMR)
        gates_S1 = (gates_TK.flatten()[order_S] * ctx.scaling).to(z_TZ.dtype).unsqueeze(-1)
        dy_SM, z_SZ = _columns_of_grad(ctx.columns, dy)[token_S], z_TZ[token_S]
        inner_SR = _grouped_mm(z_SZ, down_ERZ.transpose(1, 2), ends_E)
        du_SR = _grouped_mm(dy_SM, up_EMR, ends_E)
        d_up = _grouped_outer(dy_SM, inner_SR * gates_S1, ends_E)[..., :rank].to(kinds[1])
        d_gates_S = (du_SR * inner_SR).sum(dim=-1, dtype=gates_TK.dtype) * ctx.scaling
        d_gates = torch.empty_like(d_gates_S).index_copy_(0, order_S, d_gates_S).view_as(gates_TK)
        d_inner_SR = du_SR * gates_S1
        d_down = _grouped_outer(d_inner_SR, z_SZ, ends_E)[:, :rank, :width].to(kinds[0])
        dz = None
        if ctx.needs_input_grad[1]:
            rows_SZ = _grouped_mm(d_inner_SR, down_ERZ, ends_E)
            dz = torch.zeros_like(z_TZ).index_add_(0, token_S, rows_SZ)[:, :width]
        return dy, dz, d_gates, None, d_down, None, None, None, *_unstacked(d_up, ups_EMR, ctx.groups)


def sorted_slots(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(token of each slot [S], its number in [T, K] order [S], end of each expert's slots [E] int32), on the device."""
    experts_S, order_S = experts_TK.flatten().sort(stable=True)
    numbers_E = torch.arange(num_experts, device=experts_TK.device)
    ends_E = torch.searchsorted(experts_S, numbers_E, right=True, out_int32=True)
    return order_S.div(experts_TK.shape[1], rounding_mode="floor"), order_S, ends_E


def _padded(z_TZ: Tensor, down_ERZ: Tensor, up_EMR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All in z's dtype, Z and R padded with zeros to the 16 bytes that grouped_mm's strides have to be multiples of."""
    unit = 16 // z_TZ.element_size()
    more_z, more_r = -down_ERZ.shape[2] % unit, -down_ERZ.shape[1] % unit
    down_ERZ, up_EMR = down_ERZ.to(z_TZ.dtype), up_EMR.to(z_TZ.dtype)
    if more_r:  # as F.pad, which would write the largest tensor here twice
        padded = up_EMR.new_empty(*up_EMR.shape[:2], up_EMR.shape[2] + more_r)
        padded[..., :-more_r] = up_EMR
        padded[..., -more_r:] = 0
        up_EMR = padded
    return F.pad(z_TZ, (0, more_z)), F.pad(down_ERZ, (0, more_z, 0, more_r)), up_EMR


def _can_group(dtype: torch.dtype, rows: int, *widths: int) -> bool:
    """Whether grouped_mm takes these: 16-bit or float32, no empty side, rows a multiple of 16 bytes long."""
    aligned = all(width > 0 and width * dtype.itemsize % 16 == 0 for width in widths)
    return dtype in (torch.float32, torch.bfloat16, torch.float16) and rows > 0 and aligned


def _grouped_mm(rows_SA: Tensor, matrices_EAC: Tensor, ends_E: Tensor) -> Tensor:
    """Each expert's rows times its matrix. [S, C]"""
    if _can_group(rows_SA.dtype, *rows_SA.shape, matrices_EAC.shape[-1]):
        return F.grouped_mm(rows_SA, matrices_EAC, offs=ends_E)
    parts = rows_SA.split(_counts(ends_E))
    return torch.cat([part @ matrix for part, matrix in zip(parts, matrices_EAC, strict=True)])


def _grouped_outer(a_SA: Tensor, b_SC: Tensor, ends_E: Tensor) -> Tensor:
    """Each expert's a^T b, zero for an expert without rows. [E, A, C]"""
    if _can_group(a_SA.dtype, *a_SA.shape, b_SC.shape[1]):
        # Blackwell leaves what was in memory for an expert without rows (github.com/pytorch/pytorch/issues/172439).
        is_idle_E = ends_E.diff(prepend=ends_E.new_zeros(1)) == 0
        return F.grouped_mm(a_SA.t(), b_SC, offs=ends_E).masked_fill_(is_idle_E.view(-1, 1, 1), 0.0)
    counts = _counts(ends_E)
    return torch.stack([a.t() @ b for a, b in zip(a_SA.split(counts), b_SC.split(counts), strict=True)])


def _counts(ends_E: Tensor) -> list[int]:
    """Rows of each expert; read on the host."""
    return ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()


def add_experts(
    expert_compute: str,
    y: Tensor,
    z_TZ: Tensor,
    gates_TK: Tensor,
    experts_TK: Tensor,
    down_ERZ: Tensor,
    ups_EMR: Sequence[Tensor],
    scaling: float,
    columns: Columns,
    groups: int = 1,
) -> Tensor:
    """The chosen experts' gate-weighted sum, added in place to the columns of y; returns y.

    The same as ``y + maths.expert_forward(...)``. With T = 0 every parameter still gets a (zero) gradient.

    Args:
        expert_compute: ``gated_block``, ``grouped``, or ``auto``: :func:`choose_expert_compute`. Both are traced
            whole by torch.compile, the grouped form in bfloat16 only.
        y: [..., F]; its gradient passes through unchanged, nothing of it is kept.
        gates_TK, experts_TK: kept gates and the experts' numbers among those at hand, int64; the
            same expert may not stand twice in a row.
        down_ERZ: P (MALoRA) or A (MoLoRA).
        ups_EMR: B of each projection that the columns belong to.
        groups: see :func:`stack_ups`; of one projection it does not matter.

    Raises:
        KeyError: no such form.
    """
    num_experts, rank, _ = down_ERZ.shape
    if expert_compute == "auto":
        expert_compute = choose_expert_compute(num_experts, experts_TK.shape[1], rank, z_TZ.device.type)
        if torch.compiler.is_compiling() and z_TZ.dtype != torch.bfloat16:
            expert_compute = "gated_block"  # torch.compile knows grouped_mm in bfloat16 only
    form = {"grouped": _Grouped, "gated_block": _GatedBlock}[expert_compute]
    return form.apply(y, z_TZ, gates_TK, experts_TK, down_ERZ, scaling, columns, groups, *ups_EMR)


class _AddRows(torch.autograd.Function):
    """y[token of row] += row."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, rows_SM: Tensor, token_S: Tensor, columns: Columns) -> Tensor:
        ctx.save_for_backward(token_S)
        ctx.columns = columns
        target = columns.of(y)
        target.index_add_(0, token_S, rows_SM.view(-1, *target.shape[1:]))
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (token_S,) = ctx.saved_tensors
        return dy, columns_rows(ctx.columns, dy, token_S), None, None


def columns_rows(columns: Columns, dy: Tensor, token_S: Tensor) -> Tensor:
    """Rows of the projection's part of a gradient. [S, M]"""
    return columns.of(dy.contiguous())[token_S].flatten(1)


def add_rows(y: Tensor, rows_SM: Tensor, token_S: Tensor, columns: Columns) -> Tensor:
    """Add rows that came back from other ranks in place to the columns of y, at their tokens; returns y."""
    return _AddRows.apply(y, rows_SM, token_S, columns)
