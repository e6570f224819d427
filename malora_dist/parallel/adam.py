"""Which Adam megatron-core's optimizers take."""

from __future__ import annotations

import sys

from malora_dist.parallel.backends import TORCH_ADAM, Choice


def make_megatron_use(choice: Choice) -> None:
    """Put the chosen Adam in the place of the one that megatron-core took.

    megatron-core takes the first importable of Transformer Engine, apex and torch when it is
    imported, whatever the device, and keeps it with flags that say whose it is in two modules. They
    stay as they are set here: its distributed optimizer asks them again in every checkpoint.
    """
    adam = choice.load()
    is_torch = choice.chosen == TORCH_ADAM
    vars(sys.modules["megatron.core.optimizer"]).update(Adam=adam, USING_PYTORCH_OPTIMIZER=is_torch)
    vars(sys.modules["megatron.core.optimizer.distrib_optimizer"]).update(
        Adam=adam,
        HAVE_APEX_OR_TE=not is_torch,
        USING_TE_OPTIMIZER=choice.chosen.startswith("transformer_engine."),
        USING_APEX_OPTIMIZER=choice.chosen.startswith("apex."),
    )
