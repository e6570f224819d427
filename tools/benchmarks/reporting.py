"""What reports cost: a recorded step with its report against a step that is not, in turns on one trainer.

    python tools/benchmarks/reporting.py
    python tools/benchmarks/reporting.py --device cuda --bf16 --shape llama3-8b --layers 2 --tokens 8192

A recorded step counts routing, traffic and waits; its report reduces them over all ranks and writes them to all
loggers that a run has by default. The cost at a log_interval of L is (recorded / plain - 1) / L of a run's steps.

Result: tools/benchmarks/results/reporting.json.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import headline, interleaved, now, print_table, ratios, spread, summary, write_results
from models import build_trainer, llama_like, write_inputs

from malora_dist.config import Config
from malora_dist.families.shapes import SHAPES, released_config
from malora_dist.parallel import topology as layout
from malora_dist.parallel.device import choose_device

LOG_INTERVAL = Config().log_interval


class Steps:
    """Plain and recorded steps of one trainer; every recorded one is reported as the trainer's Log does it."""

    def __init__(self, trainer: Any) -> None:
        from malora_dist.training.callbacks import Log

        self._trainer = trainer
        (self._log,) = (callback for callback in trainer.callbacks if isinstance(callback, Log))

    def plain(self) -> float:
        """Seconds of a step."""
        began = now(self._trainer.topology.device)
        self._trainer.train_step()
        return now(self._trainer.topology.device) - began

    def recorded(self) -> float:
        """Seconds of a step and its report."""
        began = now(self._trainer.topology.device)
        step = self._trainer.train_step(record=True)
        with contextlib.redirect_stdout(io.StringIO()):
            self._log.after_step(step)
        return now(self._trainer.topology.device) - began


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512, help="of a Llama like Llama 2 (default: %(default)s)")
    parser.add_argument("--shape", choices=SHAPES, help="a released model's layers instead")
    parser.add_argument("--layers", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=1024, help="of a step (default: %(default)s)")
    parser.add_argument("--seq-length", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=30, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch (default: all cores)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--keys", nargs="+", default=[], help="more config keys, key=value")
    return parser.parse_args()


def main() -> None:
    """Measure, print, write."""
    args = parse()
    torch.set_num_threads(args.threads)
    hf = released_config(args.shape) if args.shape else llama_like(args.hidden, args.layers)
    hf.num_hidden_layers = args.layers
    rows = args.tokens // args.seq_length
    with tempfile.TemporaryDirectory() as directory:
        dtype = torch.bfloat16 if args.bf16 else torch.float32
        inputs = write_inputs(Path(directory), hf, args.seq_length, dtype)
        keys = [f"device={choose_device(args.device).type}", f"save={directory}/run", "log_interval=1", *args.keys]
        trainer = build_trainer(inputs.overrides(*keys, micro_batch_size=rows, global_batch_size=rows))
        steps = Steps(trainer)
        seconds = interleaved({"plain": steps.plain, "recorded": steps.recorded}, args.rounds, warmup=3)
        layout.destroy()
    ratio = ratios(seconds["recorded"], seconds["plain"])
    cost = {name: (value - 1) / LOG_INTERVAL for name, value in ratio.items()}
    figures = {name: summary(values) for name, values in seconds.items()}
    table = [(name, f"{f['median'] * 1e3:.1f}") for name, f in figures.items()]
    print_table(("step", "ms"), table)
    print(f"recorded / plain {spread(ratio)}; at log_interval={LOG_INTERVAL} {spread(cost)} of a step")
    write_results(__file__, {"seconds": figures, "recorded_over_plain": ratio, "cost": cost}, "megatron-core")
    headline(recorded_over_plain=ratio["median"], cost_percent=100 * cost["median"])


if __name__ == "__main__":
    main()
