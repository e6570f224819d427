"""The process in which against.py runs one checkout: JSON calls in, JSON answers out.

    python checkout_worker.py CHECKOUT

It uses CHECKOUT's package, and of its benchmarks models.py: `write_inputs` and `build_trainer` there are all that two
checkouts have to have in common, besides Trainer.train_step.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig


class Worker:
    """Holds one trainer."""

    _trainer: Any = None

    def __init__(self, checkout: Path) -> None:
        sys.path[:1] = [str(checkout), str(checkout / "tools" / "benchmarks")]  # in place of this file's folder
        self._models = importlib.import_module("models")
        package = importlib.import_module("malora_dist").__file__ or ""
        assert Path(package).is_relative_to(checkout), f"{package} is not the package of {checkout}"

    def open(self, directory: str, config: str, positions: int, bf16: bool, threads: int) -> None:
        """Write the Llama of that config and its samples."""
        torch.set_num_threads(threads)
        hf, dtype = LlamaConfig.from_pretrained(config), torch.bfloat16 if bf16 else torch.float32
        self._inputs = self._models.write_inputs(Path(directory), hf, positions, dtype)

    def build(self, keys: Sequence[str], rows: int) -> int:
        """Make a trainer in place of the last one; the number of parameters that it trains."""
        topology, self._trainer = self._trainer and self._trainer.topology, None
        gc.collect()
        overrides = self._inputs.overrides(*keys, micro_batch_size=rows, global_batch_size=rows)
        self._trainer = self._models.build_trainer(overrides, topology)
        parameters = self._trainer.trained.model[0].parameters()
        return sum(parameter.numel() for parameter in parameters if parameter.requires_grad)

    def step(self) -> tuple[float, float]:
        """Seconds of a step, and its loss."""
        began = self._now()
        step = self._trainer.train_step()
        seconds = self._now() - began
        losses = step.losses if hasattr(step, "losses") else step[0]
        return seconds, losses.overall

    def _now(self) -> float:
        """Of a clock, when all that was started on the device is done."""
        if self._trainer.topology.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def close(self) -> None:
        """Leave the process group."""
        self._trainer = None
        if torch.distributed.is_initialized():
            importlib.import_module("malora_dist.parallel.topology").destroy()


def main() -> None:
    """Answer a line with a line until there are no more; what libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker(Path(sys.argv[1]))
    for line in sys.stdin:
        method, arguments = json.loads(line)
        print(json.dumps(getattr(worker, method)(**arguments)), file=answers, flush=True)
    worker.close()


if __name__ == "__main__":
    main()
