"""AdamW and the learning-rate schedule, both megatron-core's."""

from __future__ import annotations

import torch
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from malora_dist.config import TrainConfig


def make_optimizer(config: TrainConfig, model: torch.nn.Module) -> MegatronOptimizer:
    """float32 AdamW over the adapters; gradients are clipped by their norm over all ranks' shards."""
    return get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            decoupled_weight_decay=True,
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_eps=config.adam_eps,
            clip_grad=config.clip_grad,
            params_dtype=torch.float32,
        ),
        [model],
        use_gloo_process_groups=False,
    )


def make_scheduler(config: TrainConfig, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Linear warm-up, then constant, linear or cosine decay to min_lr at train_iters; counted in steps."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.lr_warmup_iters,
        lr_decay_steps=config.train_iters,
        lr_decay_style=config.lr_decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=config.train_iters,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
