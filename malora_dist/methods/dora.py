"""DoRA: y = mag (W0 x + s B A x) / ||W0 + s B A|| by output (Liu et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from malora_dist.methods.base import Param, PeftForm, register
from malora_dist.methods.lora import Lora

#: Rows of a base weight that are brought to float32 at a time.
_ROWS = 1024


@register("dora")
class Dora(Lora):
    """LoRA for the direction of W0, and a trained length ``magnitude`` [m] for each of its rows.

    The norm is a constant for the gradient, as in PEFT. With lora_dropout W0 meets the input undropped.
    """

    magnitude = Param("out", from_norms=True)

    peft = PeftForm({"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}, use_dora=True)

    def squared_norms(self, p: Mapping[str, Tensor], weight_OI: Tensor) -> Tensor:
        """||W0 + s B A||^2 by row, without the [m, n] product B A.

        Row i is ||W0_i||^2 + 2 s (W0 A^T)_i . B_i + s^2 B_i (A A^T) . B_i. Each term is a sum over the
        input, so the shares of its shards add up.
        """
        wide = torch.promote_types(weight_OI.dtype, torch.float32)
        a, b, s = p["A"].to(wide), p["B"].to(wide), self.scaling
        gram = a @ a.t()
        parts = []
        for weight, rows in zip(weight_OI.split(_ROWS), b.split(_ROWS), strict=True):
            weight = weight.to(wide)
            cross = weight @ a.t()
            parts.append(weight.square().sum(dim=-1) + ((2 * s * cross + s**2 * (rows @ gram)) * rows).sum(dim=-1))
        return torch.cat(parts)

    def output(self, p: Mapping[str, Tensor], y_TO: Tensor, squared_norms_O: Tensor | None) -> Tensor:
        assert squared_norms_O is not None, "see squared_norms"
        # In float32: next to 1 a bfloat16 factor would move in steps of half a percent.
        return (y_TO * (p["magnitude"] / squared_norms_O.sqrt())).to(y_TO.dtype)
