"""Job of tests/test_distributed_optimizer.py."""

from __future__ import annotations

from tests.jobs import _trainer


def state_sizes(overrides: list[str]) -> tuple[int, int, int]:
    """After one step: this rank's entries of Adam's first moment, dense and expert, and its adapter parameters."""
    from malora_dist.parallel import topology as layout

    trainer = _trainer(overrides)
    try:
        trainer.train_step()
        dense, expert = (
            sum(state["exp_avg"].numel() for state in part.optimizer.state.values())
            for part in trainer.trained.optimizer.chained_optimizers
        )
        parameters = sum(p.numel() for chunk in trainer.ddp for p in chunk.parameters() if p.requires_grad)
        return dense, expert, parameters
    finally:
        layout.destroy()
