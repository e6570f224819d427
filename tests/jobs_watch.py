"""Jobs of tests/test_watch.py: runs with a planted fault."""

from __future__ import annotations

import contextlib
import io

import torch

from malora_dist.parallel import topology as layout
from tests.jobs import _trainer


def train_with_blind_routers(overrides: list[str]) -> str:
    """Routers of zeros give all tokens the same logits, and so the same experts; what the run says."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        trainer = _trainer(overrides)
        try:
            for chunk in trainer.trained.model:
                for name, parameter in chunk.named_parameters():
                    if name.endswith("router"):
                        with torch.no_grad():
                            parameter.zero_()
            trainer.train()
        finally:
            layout.destroy()
    return output.getvalue()
