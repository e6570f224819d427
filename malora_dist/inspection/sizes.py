"""What the adapter trains, beside every other method on the same base."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from malora_dist.errors import ConfigError
from malora_dist.inspection.source import Adapter
from malora_dist.methods.base import METHODS
from malora_dist.methods.comparison import Base, Candidate, as_large_as


class Row(NamedTuple):
    """One method with the adapter's settings.

    Attributes:
        trained: parameters, routers included; None: the method cannot have these settings.
        equal_rank: the largest `lora_rank` with which it trains no more than the adapter; None: there is none.
        problem: why one of them is None.
    """

    method: str
    trained: int | None
    equal_rank: int | None
    problem: str


def size_table(adapter: Adapter) -> list[Row]:
    """The adapter first, then every other method at its settings, from small to large."""
    base = Base(adapter.widths, adapter.num_layers, parameters=0)
    own = Candidate(adapter.spec.method, adapter.spec, base)
    others = [_row(method, own) for method in METHODS if method != adapter.spec.method]
    others.sort(key=lambda row: (row.trained is None, row.trained or 0, row.method))
    return [Row(adapter.spec.method, own.total, adapter.spec.lora_rank, ""), *others]


def _row(method: str, own: Candidate) -> Row:
    problems = []
    trained = equal_rank = None
    try:
        same = Candidate(method, dataclasses.replace(own.spec, method=method, freeze=[]), own.base)
        same.check()
        trained = same.total
    except ConfigError as error:
        problems.append(str(error))
    try:
        equal_rank = as_large_as(own, method).spec.lora_rank
    except ConfigError as error:
        problems.append(str(error))
    return Row(method, trained, equal_rank, problems[0] if problems else "")
