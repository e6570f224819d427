"""What a training step has to set in megatron-core's globals."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler


def seed_dropout(seed: int) -> None:
    """Seed the generators that dropout draws from; with TP each rank has its own, for its own shard of the sequence."""
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def set_aux_loss_scale(scale: float, device: torch.device) -> None:
    """What every auxiliary loss is multiplied by; megatron's schedules only set it for megatron's own experts."""
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(scale, device=device))
