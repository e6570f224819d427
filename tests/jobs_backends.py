"""Jobs of tests/test_backends.py."""

from __future__ import annotations

from typing import Any

import torch

from malora_dist.parallel import topology as layout
from tests.jobs import _trainer


class FusedAdam(torch.optim.AdamW):
    """Stands for a fused Adam: takes the argument that megatron gives to those only."""

    def __init__(self, params: Any, adam_w_mode: bool, **kwargs: Any) -> None:
        super().__init__(params, **kwargs)
        self.adam_w_mode = adam_w_mode


def make_optimizers(overrides: list[str]) -> dict[str, Any]:
    """Class names of the optimizers that megatron makes when what it took at import is not what is chosen."""
    trainer = _trainer(overrides)
    from malora_dist.parallel.backends import Choice, adam_choice
    from malora_dist.training.optimizer import make_optimizer

    def make(choice: Choice) -> list[torch.optim.Optimizer]:
        optimizer = make_optimizer(trainer.config, trainer.ddp, choice)
        return [part.optimizer for part in optimizer.chained_optimizers]

    try:
        # Megatron's own code runs here from now on as if a fused Adam had been importable.
        _take_at_import(FusedAdam)
        plain = make(adam_choice(trainer.config, trainer.topology.device))
        flags = _flags()
        fused = make(Choice("Adam", "tests.jobs_backends.FusedAdam", ""))
        return {
            "torch chosen": {type(adam) is torch.optim.AdamW for adam in plain},
            "flags": flags,
            "fused chosen": {type(adam) is FusedAdam and adam.adam_w_mode for adam in fused},
        }
    finally:
        layout.destroy()


def _take_at_import(adam: type) -> None:
    """Leave megatron-core as it is after an import that found Transformer Engine's Adam."""
    from megatron.core import optimizer

    vars(optimizer).update(Adam=adam, USING_PYTORCH_OPTIMIZER=False)
    vars(optimizer.distrib_optimizer).update(Adam=adam, HAVE_APEX_OR_TE=True, USING_TE_OPTIMIZER=True)


def _flags() -> dict[str, bool]:
    """What megatron-core's distributed optimizer asks when it saves and loads."""
    from megatron.core.optimizer import distrib_optimizer

    return {name: vars(distrib_optimizer)[name] for name in ("HAVE_APEX_OR_TE", "USING_TE_OPTIMIZER")}


def write_banners(overrides: list[str]) -> dict[str, Any]:
    """Banners of a few settings, and the number of parameters that really train."""
    from malora_dist.metrics.banner import banner

    seen: dict[str, Any] = {}
    for method in ("malora", "asymmetric_lora"):
        trainer = _trainer([*overrides, f"method={method}"])
        model = trainer.trained.model
        try:
            arguments = (trainer.config, trainer.hf, trainer.base, trainer.plan, trainer.topology)
            seen[method] = banner(model, *arguments)
            if method == "malora":
                seen["trainable"] = sum(p.numel() for chunk in model for p in chunk.parameters() if p.requires_grad)
                trainer.config.decoder_first_pipeline_num_layers = 2
                seen["interleaved"] = banner([*model, *model], *arguments)
        finally:
            layout.destroy()
    return seen
