"""The steps of this checkout beside those of another one: step_time.py --against.

Each package trains in a process of its own (checkout_worker.py); the processes take turns round by round. Before
timing, both must train as many parameters and start at the same loss: B is zero, so that is the base's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common import interleaved, print_table, ratios, spread, summary
from transformers import LlamaConfig

HERE = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("checkout_worker.py")


class Checkout:
    """A process with the package of one checkout."""

    def __init__(self, root: Path, threads: int) -> None:
        self.root = root
        environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": str(threads)}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen([sys.executable, str(WORKER), str(root)], env=environment, **pipes)

    @property
    def commit(self) -> str:
        """With a + where files differ from it; empty outside git."""
        command = ["git", "-C", str(self.root), "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    def call(self, method: str, **arguments: Any) -> Any:
        """What the worker's method answers.

        Raises:
            RuntimeError: the process failed.
        """
        assert self._process.stdin is not None, "asked for"
        assert self._process.stdout is not None, "asked for"
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            print(json.dumps([method, arguments]), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process of {self.root} failed; its error stands above")
        return json.loads(answer)

    def step_seconds(self) -> float:
        """Of one step."""
        return self.call("step")[0]

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()


@contextlib.contextmanager
def checkouts(other: Path, directory: Path, hf: LlamaConfig, args: argparse.Namespace) -> Iterator[dict[str, Checkout]]:
    """{"here", "other": process}, each with its own copy of the same Llama.

    Raises:
        RuntimeError: a process failed.
    """
    hf.save_pretrained(directory)
    settings = {"config": str(directory), "positions": args.seq_length, "bf16": args.bf16, "threads": args.threads}
    found = {name: Checkout(root, args.threads) for name, root in (("here", HERE), ("other", other.resolve()))}
    try:
        for name, checkout in found.items():
            checkout.call("open", directory=str(directory / name), **settings)
        yield found
    finally:
        for checkout in found.values():
            checkout.close()


def compare_checkouts(
    runs: Mapping[str, Sequence[str]], directory: Path, hf: LlamaConfig, args: argparse.Namespace
) -> dict[str, Any]:
    """{"commits": .., name: figures} of runs with these config keys, to which --against-keys are added over there.

    Raises:
        RuntimeError: a process failed, or the keys do not mean the same adapter in both.
    """
    figures: dict[str, Any] = {}
    rows = args.tokens // args.seq_length
    with checkouts(args.against, directory, hf, args) as both:
        figures["commits"] = {name: checkout.commit for name, checkout in both.items()}
        for run, keys in runs.items():
            own = {"here": [*keys], "other": [*keys, *args.against_keys]}
            numbers = {name: checkout.call("build", keys=own[name], rows=rows) for name, checkout in both.items()}
            losses = {name: checkout.call("step")[1] for name, checkout in both.items()}
            if len(set(numbers.values())) > 1 or abs(losses["here"] - losses["other"]) > 1e-3:
                found = f"trainable parameters {numbers}, first loss {losses}"
                raise RuntimeError(f"{run} is not the same in both ({found}): see --against-keys")
            steps = {name: partial(Checkout.step_seconds, checkout) for name, checkout in both.items()}
            seconds = interleaved(steps, args.rounds)
            figures[run] = {
                "trainable_parameters": numbers["here"],
                "seconds": {name: summary(values) for name, values in seconds.items()},
                "here_over_other": ratios(seconds["here"], seconds["other"]),
            }
    return figures


def print_checkouts(figures: Mapping[str, Any]) -> dict[str, float]:
    """The table of one model, and its headline ratios."""
    runs = {name: f for name, f in figures.items() if name != "commits"}
    rows = [
        (
            name,
            f"{f['trainable_parameters'] / 1e6:.2f}",
            *(f"{f['seconds'][side]['median'] * 1e3:.0f}" for side in ("here", "other")),
            spread(f["here_over_other"]),
        )
        for name, f in runs.items()
    ]
    here, other = (f"{side} ({figures['commits'][side] or 'no commit'}) ms" for side in ("here", "other"))
    print_table(("method", "M params", here, other, "here / other [quartiles]"), rows)
    return {f"{name}_here_over_other": f["here_over_other"]["median"] for name, f in runs.items()}
