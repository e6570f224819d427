"""HydraLoRA: y = W0 x + s sum_{t in top-k} g_t(x) B_t A x (Tian et al. 2024).

Published with all experts for every token, which is topk = num_lora_experts here.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn.functional import linear

from malora_dist.methods.base import Chain, Method, Param, register
from malora_dist.methods.start import zeros


@register("hydralora")
class Hydralora(Method):
    """One shared A [r, n] and an up-projection B_t [m, r] per expert."""

    router = Param("logit", "in")
    A = Param("rank", "in")
    B = Param("expert", "out", "rank", start=zeros)

    sent = "rank"
    chain = Chain(project="A", down=None, up="B")

    def project(self, p: Mapping[str, Tensor], x_TI: Tensor) -> Tensor:
        return linear(x_TI, p["A"])

    def expert(self, p: Mapping[str, Tensor], z_TD: Tensor) -> Tensor:
        return linear(z_TD, p["B"])
