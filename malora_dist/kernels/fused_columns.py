"""Where projections lie in the output of megatron's fused linears, and which of them are computed together.

qkv is interleaved by query group, [q heads | k | v] in each; gate and up lie one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from malora_dist.kernels.experts import Columns


def columns_of(widths: Mapping[str, tuple[int, int]], groups: int, tp: int) -> dict[str, Columns]:
    """The columns of each projection on one TP rank.

    Args:
        widths: full (in, out) widths of every projection fused into the linear, in fused order.
        groups: query groups over all TP ranks, 1 for other linears.
        tp: ranks the output is sharded over.
    """
    groups = max(groups // tp, 1)
    columns, start = {}, 0
    for projection, (_, out_features) in widths.items():
        width = out_features // tp // groups
        columns[projection] = Columns(groups, start, width)
        start += width
    return columns


class Run(NamedTuple):
    """Projections of one adapter whose columns are adjacent: one product serves them all.

    Attributes:
        projections: in fused order.
        groups: equal parts of the output, in each of which the projections lie one after the other.
        columns: all of theirs.
    """

    projections: tuple[str, ...]
    groups: int
    columns: Columns


def runs_of(projections: Sequence[str], columns: Mapping[str, Columns]) -> list[Run]:
    """The fewest runs of an adapter's projections, given in fused order.

    Args:
        columns: of every projection fused into the linear.
    """
    runs: list[Run] = []
    for projection in projections:
        own, last = columns[projection], runs[-1] if runs else None
        if last is not None and last.columns.start + last.columns.width == own.start:
            joined = last.columns._replace(width=last.columns.width + own.width)
            runs[-1] = Run((*last.projections, projection), own.groups, joined)
        else:
            runs.append(Run((projection,), own.groups, own))
    whole = sum(own.total for own in columns.values())
    return [run._replace(columns=Columns(1, 0, whole)) if run.columns.total == whole else run for run in runs]
