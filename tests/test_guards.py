"""Numbers that go wrong end a run with one line and exit code 2, before they are saved."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from malora_dist.checkpoint.convert import import_hf
from tests.conftest import write_llama
from tests.jobs_errors import Ended, check_refused
from tests.test_errors import run_arguments
from tests.workers import WorkerPool


def saved(directory: Path) -> list[str]:
    """The iterations whose checkpoints are there."""
    return sorted(path.name for path in directory.glob("iter_*"))


def train(workers: WorkerPool, processes: int, arguments: list[str]) -> list[Ended]:
    return workers.run("jobs_errors:train_main", processes, arguments=arguments)


def test_gradients_that_are_not_finite_end_the_run(
    workers: WorkerPool, base_dir: Path, task_files: list[Path], tmp_path: Path
) -> None:
    """A learning rate of 1e30: the first step is sound, those after it are skipped, and nothing of them is saved."""
    arguments = run_arguments(
        base_dir, task_files[0], tmp_path, "expert_model_parallel_size=2", "lr=1e30", "lr_decay_style=constant",
        "train_iters=9", "log_interval=1", "save_interval=5", "max_skipped_steps=3",
    )  # fmt: skip
    for rank, ended in enumerate(train(workers, 2, arguments)):
        samples = r"reverse\.jsonl:\d+, \S*reverse\.jsonl:\d+"
        line = (
            r"error: iterations 2 to 4 had no finite gradient \(loss \S+, gradient norm (nan|inf)\), as many in a row "
            rf"as max_skipped_steps=3 allows; .*lower lr=1e\+30, or mend the last samples: \S*{samples}\n"
        )
        assert re.fullmatch((f"\\[rank {rank}\\] " if rank else "") + line, ended.stderr), ended.stderr
        assert ended.code == 2
        skipped = re.findall(rf"iteration (\d) is skipped: .*; its samples: \S*{samples}\n", ended.stdout)
        assert skipped == ([] if rank else ["2", "3", "4"]), "rank 0 tells"
    assert saved(tmp_path) == []


def test_a_base_that_is_not_finite(workers: WorkerPool, task_files: list[Path], tmp_path: Path) -> None:
    """On one pipeline stage only; every rank tells the same."""
    llama, base, save = write_llama(tmp_path / "llama"), tmp_path / "base", tmp_path / "save"
    tensors = load_file(llama / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = torch.inf
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    import_hf(llama, base)
    arguments = run_arguments(base, task_files[0], save, "pipeline_model_parallel_size=2")
    for rank, ended in enumerate(train(workers, 2, arguments)):
        name = "decoder.layers.1.mlp.linear_fc2.weight"
        line = f"{base}: {name} holds values that are not finite (NaN or infinity); convert the model again"
        check_refused(ended, line, save, rank)


def test_an_adapter_that_is_not_finite(
    workers: WorkerPool, base_dir: Path, task_files: list[Path], tmp_path: Path
) -> None:
    """In an expert that only one rank holds."""
    parallel = "expert_model_parallel_size=2"
    arguments = run_arguments(base_dir, task_files[0], tmp_path / "bad", parallel)
    name = "decoder.layers.1.mlp.linear_fc1.adapters.up_proj.P"
    workers.run("jobs_guards:save_with_nan", 2, overrides=arguments, name=name, rank=1)
    save = tmp_path / "save"
    arguments = run_arguments(base_dir, task_files[0], save, parallel, f"load={tmp_path / 'bad'}")
    for rank, ended in enumerate(train(workers, 2, arguments)):
        bad = tmp_path / "bad" / "iter_0000001"
        line = f"{bad}: {name} holds values that are not finite (NaN or infinity); go on from an earlier checkpoint"
        check_refused(ended, line, save, rank)


def test_early_stopping_saves_what_it_has(
    workers: WorkerPool, base_dir: Path, task_files: list[Path], tmp_path: Path
) -> None:
    """No second evaluation can be better by so much."""
    arguments = run_arguments(
        base_dir, task_files[0], tmp_path, "pipeline_model_parallel_size=2", "eval_iters=1", "eval_interval=2",
        "train_iters=9", "early_stopping_patience=1", "early_stopping_threshold=100",
        "early_stopping_metric=lm loss validation/reverse",
    )  # fmt: skip
    first, last = train(workers, 2, arguments)
    assert (first.code, first.stderr, last.code, last.stderr) == (0, "", 0, "")
    said = last.stdout.splitlines()
    assert said[-2] == (
        "ends after iteration 4: 1 evaluations in a row have not improved lm loss validation/reverse "
        "(early_stopping_patience=1)"
    )
    assert re.fullmatch(r"best lm loss validation/reverse: \d\.\d+ at iteration [24]", said[-1]), said[-1]
    assert saved(tmp_path) == ["iter_0000004"]
