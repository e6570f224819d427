"""Jobs of tests/test_checkpoints.py: runs whose disk fails."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.jobs_errors import Ended, train_main


def train_on_a_bad_disk(arguments: list[str], fault: str, save: str, at: int, rank: int) -> Ended:
    """``malora_dist.train`` whose disk fails on one rank while it saves iteration ``at``.

    Args:
        fault: ``full``: no file can grow beyond 4 kB, ``vanished``: ``save`` is removed.
    """
    from malora_dist.checkpoint.saving import CheckpointWriter

    write = CheckpointWriter._write

    def fail(self: CheckpointWriter, pending: Any) -> None:
        is_here = pending.info.iteration == at and int(os.environ["RANK"]) == rank
        with full_disk() if is_here and fault == "full" else contextlib.nullcontext():
            if is_here and fault == "vanished":
                shutil.rmtree(Path(save))
            write(self, pending)

    with patch.object(CheckpointWriter, "_write", fail):
        return train_main(arguments)


def save_at_once(overrides: list[str]) -> None:
    """Save before the first step."""
    from malora_dist.parallel import topology as layout
    from malora_dist.training.callbacks import Save
    from tests.jobs import _trainer

    trainer = _trainer(overrides)
    try:
        [saver] = [callback for callback in trainer.callbacks if isinstance(callback, Save)]
        saver.save(0, is_last=True)
    finally:
        layout.destroy()


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
