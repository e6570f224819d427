"""MoAsyLoRA: MoLoRA whose every A_t stays at its random start; the paper doubles r for it."""

from __future__ import annotations

from malora_dist.methods.base import Param, register
from malora_dist.methods.molora import Molora


@register("mo_asymmetric_lora")
class MoAsymmetricLora(Molora):
    """A_t [r, n] random and frozen, router and B_t [m, r] trained."""

    A = Param("expert", "rank", "in", trained=False)
