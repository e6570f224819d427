"""Jobs of tests/test_guards.py."""

from __future__ import annotations

from typing import Any

import psutil
import torch

from malora_dist.config import Config
from malora_dist.errors import TrainingError
from malora_dist.parallel import topology as layout
from tests.jobs import _trainer


def _save(trainer: Any) -> None:
    """Write a checkpoint now."""
    from malora_dist.training.callbacks import Save

    [saver] = [callback for callback in trainer.callbacks if isinstance(callback, Save)]
    saver.save(trainer.trained.iteration, is_last=True)


def save_with_nan(overrides: list[str], name: str, rank: int) -> None:
    """Save a checkpoint after a step, with a NaN in one rank's shard of a parameter."""
    from malora_dist.training.parameters import globally_named

    trainer = _trainer(overrides)
    try:
        trainer.train_step()
        if trainer.topology.rank == rank:
            globally_named(trainer.trained.model)[name].data.view(-1)[3] = float("nan")
        _save(trainer)
    finally:
        layout.destroy()


def replicas_after_flips(overrides: list[str], flips: list[tuple[int, str, int]]) -> list[str]:
    """After two steps, what a save says when one bit is flipped, for each (rank, parameter, bit); "" if it saves."""
    from malora_dist.training.parameters import globally_named

    trainer = _trainer(overrides)
    said = []
    try:
        for _ in range(2):
            trainer.train_step()
        trainer.replicas.check(trainer.trained.iteration)
        for rank, name, bit in flips:
            trainer.trained.iteration += 1
            if trainer.topology.rank == rank:
                bits = globally_named(trainer.trained.model)[name].data.view(-1).view(torch.int32)
                bits[-1] ^= torch.tensor(1 << bit, dtype=torch.int64).int()
            try:
                _save(trainer)
                said.append("")
            except TrainingError as error:
                said.append(str(error))
            if trainer.topology.rank == rank:
                bits[-1] ^= torch.tensor(1 << bit, dtype=torch.int64).int()
        return said
    finally:
        layout.destroy()


def evaluate_around(overrides: list[str], steps: int) -> tuple[dict[str, float], dict[str, float]]:
    """What evaluations find before and after so many steps."""
    trainer = _trainer(overrides)
    try:
        before = trainer.evaluate().scalars
        for _ in range(steps):
            trainer.train_step()
        return before, trainer.evaluate().scalars
    finally:
        layout.destroy()


def predictions(logits: torch.Tensor) -> list[int]:
    """The most probable tokens, of logits [L, V] whose columns are shared out over TP ranks."""
    from malora_dist.layers.decoder import most_probable

    size = layout.world_size_from_env()
    config = Config(device="cpu", tensor_model_parallel_size=size, sequence_parallel=size > 1)
    topology = layout.initialize(config)
    try:
        return most_probable(logits.chunk(size, dim=-1)[topology.tp_rank], topology).tolist()
    finally:
        layout.destroy()


def resources() -> dict[str, int]:
    """Of this process: threads (those of C++ too), open files, resident memory in MiB."""
    process = psutil.Process()
    return {
        "threads": process.num_threads(),
        "open files": process.num_fds(),
        "MiB": process.memory_info().rss // 2**20,
    }
