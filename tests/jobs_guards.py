"""Jobs of tests/test_guards.py."""

from __future__ import annotations

from malora_dist.parallel import topology as layout
from tests.jobs import _trainer


def save_with_nan(overrides: list[str], name: str, rank: int) -> None:
    """Save a checkpoint after a step, with a NaN in one rank's shard of a parameter."""
    from malora_dist.training.parameters import globally_named

    trainer = _trainer(overrides)
    try:
        trainer.train_step()
        if trainer.topology.rank == rank:
            globally_named(trainer.trained.model)[name].data.view(-1)[3] = float("nan")
        trainer.save()
    finally:
        layout.destroy()
