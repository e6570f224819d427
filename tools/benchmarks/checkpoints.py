"""What checkpoints cost: a step that saves, with and without async_save, and a start that verifies.

    python tools/benchmarks/checkpoints.py --base BASE --data FILE

One process, MALoRA at the paper's setting. The contenders take turns: a step, a step that saves, and a step that begins
to save with async_save, which is published two steps later; then starts of a run (the model built, base read, data
tokenised; importing is not counted) with the base verified or not. Ratios are taken round by round. Files come from the
page cache and go to ``--scratch``.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import headline, interleaved, now, print_table, ratios, spread, summary, write_results
from models import build_trainer
from settings import SETTINGS

from malora_dist.checkpoint.adapter import describe_run
from malora_dist.checkpoint.saving import CheckpointWriter
from malora_dist.parallel import topology as layout
from malora_dist.training import trainer as trainer_module


def seconds_of(action: Callable[[], Any]) -> float:
    """How long it takes on the CPU."""
    device = torch.device("cpu")
    began = now(device)
    action()
    return now(device) - began


class Unverified:
    """Stands for the verification of a base, and does nothing."""

    note = ""

    def __init__(self, path: Path) -> None:
        pass

    def finish(self) -> None:
        pass


def saving_steps(trainer: Any, save: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of a step alone, of one that saves, of one that begins to save, and of publishing that one."""
    writers = {}
    for is_async in (False, True):
        config = replace(trainer.config, save=str(save / str(is_async)), async_save=is_async, keep_last=1)
        origin = describe_run(config, trainer.base, trainer.hf.num_hidden_layers, {})
        writers[is_async] = CheckpointWriter(config, origin, trainer.topology)
        writers[is_async].prepare(goes_on_here=False)

    def step(*actions: Callable[[], object]) -> None:
        trainer.train_step()
        for action in actions:
            action()

    def begin_async() -> None:
        writers[True].begin(trainer.trained, {})

    publish: list[float] = []

    def with_async() -> float:
        seconds = seconds_of(lambda: step(begin_async))
        step()
        publish.append(seconds_of(writers[True].finish))
        return seconds

    def save_now() -> None:
        writers[False].begin(trainer.trained, {})
        writers[False].finish()

    timed = {
        "step": lambda: seconds_of(step),
        "step that saves": lambda: seconds_of(lambda: step(save_now)),
        "step that begins to save": with_async,
    }
    return interleaved(timed, rounds) | {"publish": publish[1:]}


def starts(overrides: list[str], topology: Any, rounds: int) -> dict[str, list[float]]:
    """Seconds until the first step, with the base verified and without."""

    def unverified() -> float:
        with patch.object(trainer_module, "BaseVerification", Unverified):
            return seconds_of(lambda: build_trainer(overrides, topology))

    timed = {"start": unverified, "start that verifies": lambda: seconds_of(lambda: build_trainer(overrides, topology))}
    return interleaved(timed, rounds)


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="a converted model")
    parser.add_argument("--data", type=Path, required=True, help="a file of a format that training reads")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--scratch", type=Path, help="directory on the disk to write to (default: the temporary one)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch; default: one per core")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    overrides = [f"pretrained_checkpoint={args.base}", f"data=[{{path: {str(args.data)!r}}}]", "device=cpu"]
    overrides += [*SETTINGS["paper"].overrides("malora"), "micro_batch_size=4", "global_batch_size=4", "seq_length=256"]
    overrides += ["bf16=true", "eval_iters=0", "validation_samples=0"]
    with tempfile.TemporaryDirectory(prefix="malora-checkpoints-", dir=args.scratch) as scratch:
        try:
            trainer = build_trainer(overrides)
            seconds = saving_steps(trainer, Path(scratch), args.rounds)
            size = sum(f.stat().st_size for f in Path(scratch, "False").rglob("*") if f.is_file())
            seconds |= starts(overrides, trainer.topology, args.rounds)
        finally:
            layout.destroy()
    print_table(["", "seconds"], [[name, f"{summary(values)['median']:.3f}"] for name, values in seconds.items()])
    found = {
        "saves/step": ratios(seconds["step that saves"], seconds["step"]),
        "begins to save/step": ratios(seconds["step that begins to save"], seconds["step"]),
        "verifies/start": ratios(seconds["start that verifies"], seconds["start"]),
    }
    for name, ratio in found.items():
        print(f"{name}: {spread(ratio)}")
    write_results(__file__, {"checkpoint_bytes": size, "seconds": seconds, "ratios": found}, "megatron-core")
    headline(**{name: ratio["median"] for name, ratio in found.items()})


if __name__ == "__main__":
    main()
