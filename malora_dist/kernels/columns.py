"""Where projections lie in the output of a fused linear, and which of them are computed together.

qkv is interleaved by query group, [q heads | k | v] in each; gate and up lie one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Columns(NamedTuple):
    """The columns of a fused linear's output that belong to one projection, or to several adjacent ones.

    Attributes:
        blocks: the output consists of so many equal parts (query groups of qkv, else 1),
        start, width: and in each of them `width` columns from `start` on are meant.
    """

    blocks: int
    start: int
    width: int

    @property
    def total(self) -> int:
        """Columns in all blocks together."""
        return self.blocks * self.width

    def of(self, y: Tensor) -> Tensor:
        """A view of y [..., whole output] as [T, width], or [T, blocks, width] where there are several."""
        flat = y.view(-1, y.shape[-1])
        if self.blocks == 1:
            return flat[:, self.start : self.start + self.width]
        blocks = flat.view(flat.shape[0], self.blocks, y.shape[-1] // self.blocks)
        return blocks[..., self.start : self.start + self.width]

    def rows_of(self, weight_OI: Tensor) -> Tensor:
        """The rows of the linear's weight that make these columns. [total, I]; a view where they are adjacent"""
        blocks = weight_OI.unflatten(0, (self.blocks, -1))
        return blocks[:, self.start : self.start + self.width].flatten(0, 1)


def columns_of(widths: Mapping[str, tuple[int, int]], blocks: int, tp: int) -> dict[str, Columns]:
    """The columns of each projection on one TP rank.

    Args:
        widths: full (in, out) widths of every projection fused into the linear, in fused order.
        blocks: query groups over all TP ranks, 1 for other linears.
        tp: ranks the output is sharded over.
    """
    blocks = max(blocks // tp, 1)
    columns, start = {}, 0
    for projection, (_, out_features) in widths.items():
        width = out_features // tp // blocks
        columns[projection] = Columns(blocks, start, width)
        start += width
    return columns


class Span(NamedTuple):
    """Projections of one adapter whose columns are adjacent: one product serves them all.

    Attributes:
        projections: in fused order.
        blocks: equal parts of the output, in each of which the projections lie one after the other.
        columns: all of theirs.
    """

    projections: tuple[str, ...]
    blocks: int
    columns: Columns


def spans_of(projections: Sequence[str], columns: Mapping[str, Columns]) -> list[Span]:
    """The fewest spans of an adapter's projections, given in fused order.

    Args:
        columns: of every projection fused into the linear.
    """
    spans: list[Span] = []
    for projection in projections:
        own, last = columns[projection], spans[-1] if spans else None
        if last is not None and last.columns.start + last.columns.width == own.start:
            joined = last.columns._replace(width=last.columns.width + own.width)
            spans[-1] = Span((*last.projections, projection), own.blocks, joined)
        else:
            spans.append(Span((projection,), own.blocks, own))
    whole = sum(own.total for own in columns.values())
    return [span._replace(columns=Columns(1, 0, whole)) if span.columns.total == whole else span for span in spans]


def consecutive(spans: Sequence[Span]) -> list[Columns]:
    """Where each span's columns lie in a tensor of nothing but these spans, one after the other."""
    columns, start = [], 0
    for span in spans:
        columns.append(Columns(1, start, span.columns.total))
        start += span.columns.total
    return columns


def stack_rows(parts: Sequence[Tensor], blocks: int) -> Tensor:
    """Tensors of several projections, [..., O, R] each, as one whose rows are in the order of a fused output.

    Args:
        blocks: equal parts of the output, in each of which the projections lie one after the other.
    """
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.unflatten(-2, (blocks, -1)) for part in parts], dim=-2).flatten(-3, -2)


def unstack_rows(stacked: Tensor, parts: Sequence[Tensor], blocks: int) -> list[Tensor]:
    """The inverse, for the gradient of :func:`stack_rows` by its parts."""
    if len(parts) == 1:
        return [stacked]
    split = stacked.unflatten(-2, (blocks, -1)).split([part.shape[-2] // blocks for part in parts], dim=-2)
    return [part.flatten(-3, -2) for part in split]
