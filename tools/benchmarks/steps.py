"""Trainers of one Llama that take turns, and what their steps take: seconds of the parts, operations, peak memory."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import interleaved, now
from models import Inputs, build_trainer, peak_memory, spawn, write_inputs
from transformers import LlamaConfig

from malora_dist.config import Config
from malora_dist.config_file import load_config
from malora_dist.families.base import projection_widths
from malora_dist.kernels.experts import choose_expert_compute
from malora_dist.methods.budget import total
from malora_dist.parallel import topology as layout
from malora_dist.parallel.device import choose_device
from malora_dist.planning.flops import Form, step_flops


class Run(NamedTuple):
    """One way to train.

    Attributes:
        keys: config keys, ``key=value``.
        patch: changes the trainer once it is built.
    """

    keys: Sequence[str]
    patch: Callable[[Any], None] | None = None

    @property
    def config(self) -> Config:
        """With these keys."""
        return load_config(None, self.keys)


class Stopwatch:
    """A function that notes how long each call of it takes."""

    def __init__(self, function: Callable[..., Any], device: torch.device) -> None:
        self._function, self._device = function, device
        self.seconds: list[float] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        began = now(self._device)
        result = self._function(*args, **kwargs)
        self.seconds.append(now(self._device) - began)
        return result

    def run(self) -> float:
        """Call it; the seconds."""
        self()
        return self.seconds[-1]


class StepSeconds(NamedTuple):
    """Of every round."""

    step: list[float]
    forward: list[float]
    optimizer: list[float]  # clipping included

    @property
    def without_optimizer(self) -> list[float]:
        return [step - optimizer for step, optimizer in zip(self.step, self.optimizer, strict=True)]

    @property
    def backward(self) -> list[float]:
        """What is left: backward, the buffers of the gradients, and making the batch."""
        return [rest - forward for rest, forward in zip(self.without_optimizer, self.forward, strict=True)]


class Bench:
    """Trainers of one model that take turns.

    Args:
        directory: where the Llama and its samples are written.
        hf: config of that Llama.
    """

    def __init__(self, directory: Path, hf: LlamaConfig, args: argparse.Namespace) -> None:
        self.hf, self.tokens, self.seq_length = hf, args.tokens, args.seq_length
        self.device, self._threads = choose_device(args.device), args.threads
        dtype = torch.bfloat16 if args.bf16 else torch.float32
        self._inputs: Inputs = write_inputs(directory, hf, args.seq_length, dtype)

    def overrides(self, run: Run) -> list[str]:
        """All config keys of a run."""
        rows = self.tokens // self.seq_length
        keys = (f"device={self.device.type}", *run.keys)
        return self._inputs.overrides(*keys, micro_batch_size=rows, global_batch_size=rows)

    def form(self, run: Run) -> Form:
        """The form that the experts of every adapter are computed in."""
        config = run.config
        chosen, rank = config.expert_compute, config.declared.rank
        if chosen == "auto":
            chosen = choose_expert_compute(config.num_experts, config.topk, rank, self.device.type)
        return "grouped" if config.is_mixture and chosen == "grouped" else "gated_block"

    def operations(self, run: Run) -> float:
        """Of a step."""
        return step_flops(self.hf, run.config, self.form(run)).of_sequences(self.tokens, self.seq_length)

    def trained_numbers(self, run: Run) -> int:
        """Trainable parameters, routers included."""
        return total(run.config, projection_widths(self.hf), self.hf.num_hidden_layers)

    def step_seconds(self, runs: Mapping[str, Run], rounds: int) -> dict[str, StepSeconds]:
        """{name: each round's seconds} of trainers that are all in memory at once."""
        trainers: dict[str, Any] = {}
        try:
            for name, run in runs.items():
                first = next(iter(trainers.values()), None)
                trainers[name] = _build(run, self.overrides(run), first and first.topology)
            forwards = {name: Stopwatch(t.ddp[0].forward, self.device) for name, t in trainers.items()}
            optimizers = {name: Stopwatch(t.trained.optimizer.step, self.device) for name, t in trainers.items()}
            for name, trainer in trainers.items():
                trainer.ddp[0].forward = forwards[name]
                trainer.trained.optimizer.step = optimizers[name]
            steps = {name: Stopwatch(t.train_step, self.device).run for name, t in trainers.items()}
            seconds = interleaved(steps, rounds)
            return {
                name: StepSeconds(seconds[name], *(of[name].seconds[-rounds:] for of in (forwards, optimizers)))
                for name in runs
            }
        finally:
            trainers.clear()
            gc.collect()
            layout.destroy()

    def peak_bytes(self, run: Run) -> int:
        """Bytes that two steps need above the built model: activations, gradients, optimizer state, workspaces."""
        with spawn(_MemoryProbe, 1, self._threads, for_memory=True) as probe:
            (peak,) = probe.call("peak_bytes", run, self.overrides(run))
        return peak


class _MemoryProbe:
    """Lives in a process of its own."""

    def peak_bytes(self, run: Run, overrides: list[str]) -> int:
        trainer = _build(run, overrides)
        return peak_memory(lambda: [trainer.train_step() for _ in range(2)], trainer.topology.device)


def _build(run: Run, overrides: Sequence[str], topology: layout.Topology | None = None) -> Any:
    trainer = build_trainer(overrides, topology)
    if run.patch is not None:
        run.patch(trainer)
    return trainer
