"""Ablation (paper table 3): MALoRA without the shared S_A, y = W0 x + s sum_t g_t(x) B_t P_t S_t x."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn.functional import linear

from malora_dist.errors import ConfigError
from malora_dist.methods.base import Method, Param, register
from malora_dist.methods.malora import coefficients, shared_basis
from malora_dist.methods.start import zeros


@register("malora_unshared")
class MaloraUnshared(Method):
    """Every expert has a down-projection S_t [d / N, n] of its own, which together have S_A's size."""

    router = Param("logit", "in")
    S = Param("expert", "shared", "in", start=shared_basis)
    P = Param("expert", "rank", "shared", start=coefficients)
    B = Param("expert", "out", "rank", start=zeros)

    sent = "in"
    default_rank = 12
    is_ablation = True

    def project(self, p: Mapping[str, Tensor], x_TI: Tensor) -> Tensor:
        return x_TI

    def expert(self, p: Mapping[str, Tensor], z_TD: Tensor) -> Tensor:
        return linear(linear(linear(z_TD, p["S"]), p["P"]), p["B"])

    def widths(self, in_features: int, out_features: int) -> dict[str, int]:
        """As every method's, with d / N for d."""
        own = self.settings.shared_dim // self.num_experts
        return {**super().widths(in_features, out_features), "shared": own}

    def check(self) -> None:
        super().check()
        shared, experts = self.settings.shared_dim, self.num_experts
        if shared % experts:
            cure = f"set a multiple of {experts}"
            raise ConfigError("shared_dim", shared, f"must be divisible by num_lora_experts={experts} here", cure)

    def check_widths(self, projection: str, in_features: int, out_features: int) -> None:
        own = self.settings.shared_dim // self.num_experts
        if own > in_features:
            rule = f"leaves each expert {own}, more than the input width {in_features} of {projection}"
            cure = f"set at most {in_features * self.num_experts}"
            raise ConfigError("shared_dim", self.settings.shared_dim, rule, cure)
