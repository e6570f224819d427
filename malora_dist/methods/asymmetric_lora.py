"""AsyLoRA: LoRA whose A stays at its random start (Zhu et al. 2024); the paper doubles r for it."""

from __future__ import annotations

from malora_dist.methods.base import Param, register
from malora_dist.methods.lora import Lora


@register("asymmetric_lora")
class AsymmetricLora(Lora):
    """A [r, n] random and frozen, B [m, r] trained."""

    A = Param("rank", "in", trained=False)
