"""Jobs of tests/test_time.py: runs in which ranks are slowed by sleep."""

from __future__ import annotations

import time
from typing import Any

from malora_dist.parallel import topology as layout
from tests.jobs import _trainer


def _slow_down(trainer: Any, seconds: float, where: str) -> None:
    """From now on every step of this rank sleeps before its first forward, or in the backward of its last norm."""
    if where == "backward":
        norm = trainer.trained.model[-1].decoder.final_layernorm
        norm.register_full_backward_hook(lambda *_: time.sleep(seconds))
        return
    run = trainer._run

    def run_late(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return run(*args, **kwargs)

    trainer._run = run_late


def train_slowed(overrides: list[str], slow: list[int], seconds: float) -> None:
    """A whole run with some ranks slowed."""
    trainer = _trainer(overrides)
    try:
        if trainer.topology.rank in slow:
            _slow_down(trainer, seconds, "forward")
        trainer.train()
    finally:
        layout.destroy()


def record_slowed_step(overrides: list[str], slow: int, seconds: float, where: str) -> dict[str, Any]:
    """The second step, with one rank slowed: the report, and this rank's own waits."""
    trainer = _trainer(overrides)
    try:
        trainer.train_step()
        trainer.clock.restart()
        if trainer.topology.rank == slow:
            _slow_down(trainer, seconds, where)
        with trainer.clock.region("saving"):
            time.sleep(0.1)
        step = trainer.train_step(record=True)
        waits = trainer.clock.spans.seconds()
        pending = len(trainer.traffic._under_way)
        times = trainer.recorded().times
        return {"step": step.seconds, "waits": waits, "pending": pending, **vars(times)}
    finally:
        layout.destroy()
