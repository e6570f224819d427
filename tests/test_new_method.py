"""A method that is declared in this file alone trains on sharded experts like any other.

Two of them, neither a chain of two matrices: one that sends a shared projection, one that sends x itself and keeps
a parameter per expert that row parallelism shards. Each is compared with its own one-process maths.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from malora_dist.methods.base import METHODS, Method, Param
from malora_dist.methods.start import zeros
from tests.layouts import find
from tests.test_parity import Bench, bench, compare  # noqa: F401 (bench is a fixture)


class ToyShared(Method):
    """y = W0 x + s sum_t g_t(x) B_t (c_t * tanh(S x))"""

    router = Param("logit", "in")
    S = Param("shared", "in")
    c = Param("expert", "shared")
    B = Param("expert", "out", "shared", start=zeros)

    def project(self, p: Mapping[str, Tensor], x_TI: Tensor) -> Tensor:
        return linear(x_TI, p["S"])

    def expert(self, p: Mapping[str, Tensor], z_TD: Tensor) -> Tensor:
        return linear(torch.tanh(z_TD) * p["c"], p["B"])


class ToyWide(Method):
    """y = W0 x + s sum_t g_t(x) B_t relu(A_t x)"""

    router = Param("logit", "in")
    A = Param("expert", "rank", "in")
    B = Param("expert", "out", "rank", start=zeros)

    sent = "in"

    def project(self, p: Mapping[str, Tensor], x_TI: Tensor) -> Tensor:
        return x_TI

    def expert(self, p: Mapping[str, Tensor], z_TD: Tensor) -> Tensor:
        return linear(torch.relu(linear(z_TD, p["A"])), p["B"])


TOYS = {"toy_shared": ToyShared, "toy_wide": ToyWide}


@pytest.fixture(autouse=True)
def toys() -> Iterator[None]:
    """Registered while a test of this file runs; other tests go over all methods there are."""
    with METHODS.registered(**TOYS):
        yield


def train(**kwargs: Any) -> dict[str, Any]:
    """The job: as every other training, in a process that has the toys registered."""
    from tests.jobs import train_and_record

    with METHODS.registered(**TOYS):
        return train_and_record(**kwargs)


@pytest.mark.parametrize("dispatch", ["all_to_all", "gather_experts"])
@pytest.mark.parametrize("layout", ["EP 2", "TP 2, EP 2"])
@pytest.mark.parametrize("method", ["toy_shared", "toy_wide"])
def test_trains_where_experts_are_sharded(method: str, layout: str, dispatch: str, bench: Bench) -> None:  # noqa: F811
    """Losses, every gradient, the input's gradient and the parameters after each step."""
    job = "test_new_method:train"
    compare(*bench.run(find(layout), f"method={method}", extra=[f"dispatch={dispatch}"], steps=3, job=job))


def test_fused_projections_share_what_has_no_output_axis(bench: Bench) -> None:  # noqa: F811
    settings = ["method=toy_shared", "fuse_projections=true"]
    extra = ["dispatch=all_to_all"]
    compare(*bench.run(find("EP 2"), *settings, extra=extra, steps=2, job="test_new_method:train"))
