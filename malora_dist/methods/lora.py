"""LoRA: y = W0 x + s B A x (paper equation 1)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn.functional import linear

from malora_dist.methods.base import Chain, Method, Param, PeftForm, register
from malora_dist.methods.start import zeros


@register("lora")
class Lora(Method):
    """One low-rank pair A [r, n], B [m, r]."""

    A = Param("rank", "in")
    B = Param("out", "rank", start=zeros)

    sent = "rank"
    chain = Chain(project="A", down=None, up="B")
    peft = PeftForm({"A": "lora_A.weight", "B": "lora_B.weight"})

    def project(self, p: Mapping[str, Tensor], x_TI: Tensor) -> Tensor:
        return linear(x_TI, p["A"])

    def expert(self, p: Mapping[str, Tensor], z_TD: Tensor) -> Tensor:
        return linear(z_TD, p["B"])
