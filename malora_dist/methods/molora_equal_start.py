"""Ablation (paper table 3): MoLoRA whose A_t all start equal."""

from __future__ import annotations

from malora_dist.methods.base import Param, register
from malora_dist.methods.molora import Molora


@register("molora_equal_start")
class MoloraEqualStart(Molora):
    """MoLoRA but for the start: one draw of A for all experts of a projection."""

    A = Param("expert", "rank", "in", same_for_all=True)

    is_ablation = True
