"""MALoRA: y = W0 x + s sum_{t in top-k} g_t(x) B_t P_t (S_A x) (paper equations 6 and 7)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import linear

from malora_dist.errors import ConfigError
from malora_dist.methods.base import Chain, Method, Param, register
from malora_dist.methods.start import Draw, kaiming_uniform, left_factors, zeros


def _kaiming_k(draw: Draw) -> Tensor:
    """K [d, n] of equation 8."""
    return kaiming_uniform(draw._replace(shape=(draw.widths["shared"], draw.widths["in"])))


def shared_basis(draw: Draw) -> Tensor:
    """S_A = beta V_0, the right singular vectors of K_0 (equations 8 and 10). [d, n]"""
    k = _kaiming_k(draw)
    u, sigma = left_factors(k)
    v = (u / sigma).t() @ k.double()
    return (draw.settings.beta * v).float()


def coefficients(draw: Draw) -> Tensor:
    """P_t = the first r rows of U_t Sigma_t, over beta (equations 8 and 9). [r, d]

    They are rows of K_t in the coordinates of its own singular vectors, as long as in its own. Where r exceeds d,
    which wastes rank, a further K_t gives further rows.
    """
    rank, shared = draw.shape
    rows = []
    for _ in range(-(-rank // shared)):
        u, sigma = left_factors(_kaiming_k(draw))
        rows.append(u * sigma)
    return (torch.cat(rows)[:rank] / draw.settings.beta).float()


@register("malora")
class Malora(Method):
    """A shared down-projection S_A [d, n], and per expert P_t [r, d] and B_t [m, r] behind a router.

    ``beta`` is a scale of the start: P_t S_A starts as a Kaiming-uniform A whatever it is, while the first gradient of
    P_t grows with beta and that of S_A with 1 / beta (equation 16).
    """

    router = Param("logit", "in")
    S = Param("shared", "in", start=shared_basis)
    P = Param("expert", "rank", "shared", start=coefficients)
    B = Param("expert", "out", "rank", start=zeros)

    default_rank = 12
    chain = Chain(project="S", down="P", up="B")

    def project(self, p: Mapping[str, Tensor], x_TI: Tensor) -> Tensor:
        return linear(x_TI, p["S"])

    def expert(self, p: Mapping[str, Tensor], z_TD: Tensor) -> Tensor:
        return linear(linear(z_TD, p["P"]), p["B"])

    def check_widths(self, projection: str, in_features: int, out_features: int) -> None:
        if self.settings.shared_dim > in_features:
            raise ConfigError(
                "shared_dim",
                self.settings.shared_dim,
                f"must not exceed the input width {in_features} of {projection}, whose subspace it is",
                f"set at most {in_features}",
            )

    def warnings(self) -> list[str]:
        shared = self.settings.shared_dim
        if shared >= self.rank:
            return []
        return [
            f"shared_dim={shared} is below lora_rank={self.rank}: B_t P_t has rank at most {shared}, "
            "the rest of lora_rank is wasted"
        ]
