"""Ablation (paper table 3): B decomposed instead of A, y = W0 x + s S_B sum_t g_t(x) P_t A_t x."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn.functional import linear

from malora_dist.errors import ConfigError
from malora_dist.methods.base import Method, Param, register
from malora_dist.methods.start import orthonormal_columns, zeros


@register("malora_b")
class MaloraB(Method):
    """Per expert A_t [r, n] and P_t [d, r], and after their sum a shared up-projection S_B [m, d].

    P_t starts at zero, as B_t does elsewhere, and S_B with orthonormal columns.
    """

    router = Param("logit", "in")
    A = Param("expert", "rank", "in")
    P = Param("expert", "shared", "rank", start=zeros)
    S = Param("out", "shared", start=orthonormal_columns)

    sent = "in"
    returned = "shared"
    default_rank = 12
    is_ablation = True

    def project(self, p: Mapping[str, Tensor], x_TI: Tensor) -> Tensor:
        return x_TI

    def expert(self, p: Mapping[str, Tensor], z_TD: Tensor) -> Tensor:
        return linear(linear(z_TD, p["A"]), p["P"])

    def combine(self, p: Mapping[str, Tensor], v: Tensor) -> Tensor:
        return linear(v, p["S"])

    def check_widths(self, projection: str, in_features: int, out_features: int) -> None:
        shared = self.settings.shared_dim
        if shared > out_features:
            rule = f"must not exceed the output width {out_features} of {projection}, whose subspace it is"
            raise ConfigError("shared_dim", shared, rule, f"set at most {out_features}")
