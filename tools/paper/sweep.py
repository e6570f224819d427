"""Runs side by side, each result in a file of its own: a sweep that was killed goes on where it was.

``RUNS/IDENTITY.json`` is written when a run is done, beside it IDENTITY.safetensors where its adapter is kept.
"""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from experiment import Run
from tqdm import tqdm

#: A run's scores, see :func:`train_and_score`.
Result = dict[str, Any]


class RunError(Exception):
    """A run failed; its worker's traceback."""


class _Job(NamedTuple):
    run: Run
    file: Path


class Workers:
    """Processes that make runs side by side and live until :meth:`close`, since importing torch and megatron takes
    seconds.

    Args:
        jobs: how many; 0: the runs are made in this process.
        threads: of torch in each.
    """

    def __init__(self, jobs: int, threads: int) -> None:
        self._jobs, self._threads = jobs, threads
        self._stack = ExitStack()
        self._pipes: list[Connection] = []
        self._here = Worker()
        self._stack.callback(self._here.close)

    def close(self) -> None:
        """End them."""
        self._stack.close()
        self._pipes.clear()

    def run_all(self, runs: Sequence[Run], folder: Path, title: str) -> list[Result]:
        """The results of all runs, in their order; those that are not there yet are made.

        Raises:
            RunError: one failed. No further ones were begun; what was done or being done is kept.
        """
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / f"{run.identity}.json" for run in runs]
        todo: dict[Path, _Job] = {}
        for run, file in zip(runs, files, strict=True):  # equal runs once
            if not _is_done(run, file) and (run.keeps_adapter or file not in todo):
                todo[file] = _Job(run, file)
        if todo:
            with tqdm(total=len(runs), initial=len(runs) - len(todo), desc=title, unit="run", mininterval=1) as bar:
                (self._work_off if self._jobs else self._work_here)(list(todo.values()), bar)
        return [json.loads(file.read_text(encoding="utf-8")) for file in files]

    def _work_off(self, todo: list[_Job], bar: Any) -> None:
        """Hand the jobs to the workers, one after the other."""
        while len(self._pipes) < min(self._jobs, len(todo)):
            self._pipes.append(self._stack.enter_context(_worker(len(self._pipes), self._threads)))
        waiting = iter(todo)
        busy: list[Connection] = []
        failures = []
        for pipe, job in zip(self._pipes, waiting, strict=False):
            pipe.send(job)
            busy.append(pipe)
        while busy:
            for pipe in wait(busy):
                assert isinstance(pipe, Connection)
                try:
                    failure = pipe.recv()
                except EOFError as error:
                    raise RunError("a worker ended in the middle of a run; was it killed for its memory?") from error
                if failure:
                    failures.append(failure)
                else:
                    bar.update()
                following = None if failures else next(waiting, None)
                if following is None:
                    busy.remove(pipe)
                else:
                    pipe.send(following)
        if failures:
            raise RunError("\n".join(failures))

    def _work_here(self, todo: list[_Job], bar: Any) -> None:
        for job in todo:
            failure = self._here.attempt(job)
            if failure:
                raise RunError(failure)
            bar.update()


def adapter_file(result: Path) -> Path:
    """Beside a run's result, its adapter."""
    return result.with_suffix(".safetensors")


def _is_done(run: Run, file: Path) -> bool:
    return file.is_file() and (not run.keeps_adapter or adapter_file(file).is_file())


@contextmanager
def _worker(number: int, threads: int) -> Iterator[Connection]:
    """One of the processes."""
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(there, number, threads), daemon=True)
    process.start()
    there.close()
    try:
        yield here
    finally:
        here.close()
        process.join(timeout=0.5)
        if process.is_alive():
            process.terminate()
        process.join()


def _serve(pipe: Connection, number: int, threads: int) -> None:
    """A worker's life."""
    import torch

    torch.set_num_threads(threads)
    if torch.cuda.is_available():  # one GPU per worker
        os.environ["LOCAL_RANK"] = str(number % torch.cuda.device_count())
    worker = Worker()
    while True:
        try:
            job = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        pipe.send(worker.attempt(job))


class Worker:
    """Makes one run after the other in this process, on one layout of one process."""

    def __init__(self) -> None:
        self._topology: Any = None

    def attempt(self, job: _Job) -> str:
        """Work; what failed, and nothing if nothing did."""
        try:
            self.work(job)
        except Exception:  # noqa: BLE001  whatever it is, the script shall name the run
            return f"{job.run.cell.name}, lr {job.run.lr}, seed {job.run.seed}:\n{traceback.format_exc()}"
        return ""

    def close(self) -> None:
        """Leave the layout, so that another worker can have one in this process."""
        if self._topology is not None:
            from malora_dist.parallel import topology as layout

            self._topology = None
            layout.destroy()

    def work(self, job: _Job) -> None:
        """Train, score and write the result; each file has its final name only when it is whole."""
        from malora_dist.parallel import topology as layout
        from malora_dist.parallel.device import without_expected_warnings

        config = job.run.config
        config.validate(1)
        logging.getLogger("megatron").setLevel(logging.ERROR)
        with without_expected_warnings():
            self._topology = self._topology or layout.initialize(config, config.seed)
            from malora_dist.training.trainer import Trainer  # after initialize, which adapts megatron to the device

            trainer = Trainer(config, self._topology)
            result = train_and_score(trainer, job.run)
        if job.run.keeps_adapter:
            _when_whole(adapter_file(job.file), lambda draft: _write_adapter(trainer, draft))
        _when_whole(job.file, lambda draft: draft.write_text(json.dumps(result) + "\n", encoding="utf-8"))


def train_and_score(trainer: Any, run: Run) -> Result:
    """Train to the end, then score every file.

    Returns:
        What the run is (``cell``, ``keys``, ``lr``, ``seed``, ``tasks``), ``seconds`` of training, ``curve`` (mean
        training loss of each tenth), ``validation`` ({task: mean answer loss}), ``tests`` ({test: scores}).
    """
    from scoring import score_file
    from transformers import AutoTokenizer

    from malora_dist.checkpoint.base import hf_dir

    began = time.perf_counter()
    steps = run.config.train_iters
    losses = [trainer.train_step().losses.overall for _ in range(steps)]
    seconds = time.perf_counter() - began
    tokenizer = AutoTokenizer.from_pretrained(str(hf_dir(run.domain.base)))
    length = run.domain.keys["seq_length"]
    validation = {}
    for task in run.domain.tasks:
        kind = "greedy" if task.kind == "greedy" else "loss"
        scores = score_file(trainer, tokenizer, task.validation, kind, length)
        validation[task.name] = scores["loss"] / scores["tokens"]
    tests = {
        name: {"kind": task.kind, **score_file(trainer, tokenizer, file, task.kind, length)}
        for task in run.domain.tasks
        for name, file in task.tests.items()
        if not run.is_tried
    }
    tenth = max(1, math.ceil(steps / 10))
    return {
        "cell": run.cell.name,
        "keys": dict(run.cell.keys),
        "lr": run.lr,
        "seed": run.seed,
        "tasks": [task.name for task in run.domain.tasks],
        "seconds": round(seconds, 1),
        "curve": [round(sum(part) / len(part), 4) for part in (losses[i : i + tenth] for i in range(0, steps, tenth))],
        "validation": validation,
        "tests": tests,
    }


def _when_whole(file: Path, write: Callable[[Path], object]) -> None:
    """Write under another name first: a killed sweep leaves no half files that look like results."""
    draft = file.with_suffix(f".{os.getpid()}.draft")
    write(draft)
    draft.replace(file)


def _write_adapter(trainer: Any, file: Path) -> None:
    """The adapter's parameters under megatron's names, as on this one process."""
    from safetensors.torch import save_file

    from malora_dist.layers.adapted_linear import is_adapter_key

    (model,) = trainer.trained.model
    save_file(
        {name: p.detach().contiguous().cpu() for name, p in model.named_parameters() if is_adapter_key(name)}, file
    )
