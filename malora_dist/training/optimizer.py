"""AdamW and the learning-rate schedule, both in megatron-core's wrappers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from malora_dist.config import Config
from malora_dist.config_sections import TrainConfig
from malora_dist.parallel.adam import make_megatron_use
from malora_dist.parallel.backends import TORCH_ADAM, Choice


def make_optimizer(config: Config, model: Sequence[torch.nn.Module], adam: Choice) -> MegatronOptimizer:
    """float32 AdamW over the adapters; gradients are clipped by their norm over all ranks' shards.

    Args:
        model: this rank's chunks, as megatron's DDP wraps them.
        adam: which implementation, see :func:`malora_dist.parallel.backends.adam_choice`.
    """
    make_megatron_use(adam)
    optimizer = get_megatron_optimizer(
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
            use_distributed_optimizer=config.use_distributed_optimizer,
        ),
        list(model),
        use_gloo_process_groups=False,
    )
    if adam.chosen == TORCH_ADAM:  # megatron leaves torch's to a loop over parameters, a dozen passes over each
        for group in optimizer.param_groups:
            group["fused"] = True
    return optimizer


def make_scheduler(config: TrainConfig, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Step i of the warm-up has i / lr_warmup_iters of lr; then constant, linear or cosine decay, counted in steps.

    The step after the last would have min_lr, so that none is wasted on a learning rate of 0. What the coming step has
    is set by :func:`set_hyperparameters` and ``scheduler.step(1)``.
    """
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=max(config.lr_warmup_iters, 1),  # without warm-up the first step has lr, as with one step of it
        lr_decay_steps=config.train_iters + 1,
        lr_decay_style=config.lr_decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=config.train_iters,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def start_moments(optimizer: MegatronOptimizer) -> None:
    """Give torch's AdamW the state that its first step would make, so that there is one to save before that step.

    A first step may be skipped, and a checkpoint without moments could not be resumed.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        if not isinstance(inner, torch.optim.Adam):  # AdamW is one; the fused ones of others keep their state otherwise
            continue
        for group in inner.param_groups:
            on_device = group.get("fused") or group.get("capturable")  # where torch then wants the number of steps
            for parameter in group["params"]:
                zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                step = torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else None)
                inner.state[parameter] = {"step": step, **zeros}


@torch.no_grad()
def step_if_finite(optimizer: MegatronOptimizer) -> float:
    """Update the parameters, unless a gradient is not finite on any rank; then nothing changes, moments included.

    Returns:
        the gradients' norm over all ranks, before clipping.
    """
    optimizer.prepare_grads()
    # megatron clips by the norm and steps in one call, with no look at it; for one before, the norm is computed twice.
    norm = float(optimizer.get_grad_norm())
    if math.isfinite(norm):
        optimizer.step()
    return norm


def set_hyperparameters(
    config: TrainConfig, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler, iteration: int
) -> None:
    """Give the optimizer what the config says for the step that follows ``iteration``.

    The state of an optimizer that was read from a checkpoint brings those of the run that wrote it.
    """
    for group in optimizer.param_groups:
        group["max_lr"], group["min_lr"] = config.lr, config.min_lr  # where megatron's schedule looks first
        group["betas"], group["eps"] = (config.adam_beta1, config.adam_beta2), config.adam_eps
    scheduler.num_steps = 0
    scheduler.step(increment=iteration + 1)
