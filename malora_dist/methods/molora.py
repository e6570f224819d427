"""MoLoRA: y = W0 x + s sum_{t in top-k} g_t(x) B_t A_t x (paper equations 3 to 5)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn.functional import linear

from malora_dist.methods.base import Chain, Method, Param, register
from malora_dist.methods.start import zeros


@register("molora")
class Molora(Method):
    """N low-rank pairs A_t [r, n], B_t [m, r] behind a router.

    A_t reads x itself, so x is what travels to an expert: n numbers a token over expert-parallel ranks, and under
    tensor parallelism x crosses TP too, where the methods with a shared projection send d or r numbers.
    """

    router = Param("logit", "in")
    A = Param("expert", "rank", "in")
    B = Param("expert", "out", "rank", start=zeros)

    sent = "in"
    chain = Chain(project=None, down="A", up="B")

    def project(self, p: Mapping[str, Tensor], x_TI: Tensor) -> Tensor:
        return x_TI

    def expert(self, p: Mapping[str, Tensor], z_TD: Tensor) -> Tensor:
        return linear(linear(z_TD, p["A"]), p["B"])
