"""Jobs of tests/test_process_life.py."""

from __future__ import annotations

import contextlib
import io
import os
from typing import Any

from malora_dist.parallel import topology as layout
from tests.jobs import _trainer


def train_and_signal(overrides: list[str], rank: int, after: int, number: int) -> dict[str, Any]:
    """Train; one rank gets a signal within its step ``after``. The exit code, the last iteration, and the output."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        trainer = _trainer(overrides)
        count = trainer.batches.global_token_counts

        def signal_and_count(microbatches: Any) -> Any:
            if trainer.topology.rank == rank and trainer.trained.iteration == after - 1:
                os.kill(os.getpid(), number)
            return count(microbatches)

        trainer.batches.global_token_counts = signal_and_count
        try:
            code: Any = trainer.train()
        except SystemExit as end:
            code = end.code
        finally:
            layout.destroy()
    return {"code": code, "iteration": trainer.trained.iteration, "output": output.getvalue()}
