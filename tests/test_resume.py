"""Saving and resuming: the losses after a resume equal those of an uninterrupted run, bit by bit."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from malora_dist.checkpoint.convert import import_hf
from tests.conftest import write_llama
from tests.layouts import find
from tests.test_parity import overrides
from tests.workers import WorkerPool

LAYOUTS = {
    "one process": (1, []),
    "EP=2": (2, ["expert_model_parallel_size=2"]),
    "TP=2": (2, ["tensor_model_parallel_size=2", "sequence_parallel=true"]),
    "PP=2": (2, ["pipeline_model_parallel_size=2"]),
}


@pytest.mark.parametrize(
    ("layout", "method", "freeze"),
    [
        *((layout, "malora", "[]") for layout in LAYOUTS),
        ("EP=2", "malora", "[S]"),
        ("one process", "mo_asymmetric_lora", "[]"),
        ("EP=2", "hydralora", "[]"),
        ("TP=2", "dora", "[]"),
        ("PP=2", "dora", "[A]"),
    ],
)
def test_resume_is_bit_identical(
    layout: str, method: str, freeze: str, workers: WorkerPool, base_dir: Path, task_files: list[Path], tmp_path: Path
) -> None:
    """With dropout, warm-up and decay, in the middle of an epoch; the first run stops by exit_interval."""
    world_size, parallel = LAYOUTS[layout]
    settings = overrides(
        base_dir, task_files, *parallel, f"method={method}", f"freeze={freeze}", "lora_dropout=0.1", "train_iters=5",
        "eval_iters=2", "lr_decay_style=cosine", "lr_warmup_iters=2",
    )  # fmt: skip
    whole = workers.run("train_with_cli", world_size, overrides=[*settings, f"save={tmp_path / 'whole'}"])
    save = f"save={tmp_path / 'parts'}"
    first = workers.run("train_with_cli", world_size, overrides=[*settings, save, "exit_interval=3"])
    second = workers.run("train_with_cli", world_size, overrides=[*settings, save, f"load={tmp_path / 'parts'}"])
    for rank in range(world_size):
        assert [i for i, _ in first[rank] + second[rank]] == [1, 2, 3, 4, 5]
        assert first[rank] + second[rank] == whole[rank]


#: From -> to, for resuming on another layout; the loss curve goes on as if the layout had not changed.
RESHARDED = [
    ("EP 4", "1 process", "malora", "true"),
    ("1 process", "EP 2", "hydralora", "true"),
    ("TP 2", "1 process", "malora", "false"),
    ("1 process", "TP 2", "dora", "true"),
    ("PP 2", "1 process", "dora", "false"),
    ("1 process", "PP 2", "malora", "true"),
    ("DP 2", "1 process", "asymmetric_lora", "false"),
    ("1 process", "DP 2", "lora", "false"),
    ("TP 2, EP 2", "PP 2 interleaved", "malora", "true"),
    ("PP 2 interleaved", "TP 2, EP 2", "molora", "false"),
]


@pytest.mark.parametrize(("before", "after", "method", "fused"), RESHARDED)
def test_resume_on_another_layout(
    before: str, after: str, method: str, fused: str, workers: WorkerPool, task_files: list[Path],
    base_dir: Path, deep_base: Path, tmp_path: Path,
) -> None:  # fmt: skip
    """Adam's state comes along: without it the losses after the resume would be off by more than 5e-4."""
    base = deep_base if "interleaved" in before + after else base_dir
    settings = overrides(
        base, task_files, f"method={method}", f"fuse_projections={fused}", "train_iters=5", "eval_iters=0",
        "adam_eps=1e-8",
    )  # fmt: skip
    first, second = find(before), find(after)
    run = partial(workers.run, "train_with_cli")
    whole = run(first.processes, overrides=[*settings, *first.settings])[0]
    save = f"save={tmp_path}"
    begun = run(first.processes, overrides=[*settings, *first.settings, save, "exit_interval=3"])[0]
    ended = run(second.processes, overrides=[*settings, *second.settings, save, f"load={tmp_path}"])[0]
    assert begun == whole[:3]
    assert [i for i, _ in ended] == [4, 5]
    assert [loss for _, loss in ended] == pytest.approx([loss for _, loss in whole[3:]], rel=1e-4)


@pytest.fixture(scope="module")
def deep_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of four layers, for interleaved stages."""
    directory = tmp_path_factory.mktemp("deep")
    import_hf(write_llama(directory / "llama", num_hidden_layers=4), directory / "base")
    return directory / "base"


def test_adam_state_matters(workers: WorkerPool, base_dir: Path, task_files: list[Path], tmp_path: Path) -> None:
    """The tolerance of the test above notices a resume with Adam's state gone."""
    settings = overrides(base_dir, task_files, "train_iters=5", "eval_iters=0", "adam_eps=1e-8")
    whole = workers.run("train_with_cli", 1, overrides=settings)[0]
    workers.run("train_with_cli", 1, overrides=[*settings, f"save={tmp_path}", "exit_interval=3"])
    resume = [*settings, f"load={tmp_path}"]
    (forgetful,) = workers.run("train_with_cli", 1, overrides=resume, forget_optimizer=True)
    assert abs(forgetful[-1][1] / whole[-1][1] - 1) > 5e-4


def test_dropout_is_alive_and_seeded(workers: WorkerPool, base_dir: Path, task_files: list[Path]) -> None:
    """Otherwise the test above would not notice a dropout that never drops."""
    settings = overrides(base_dir, task_files, "train_iters=3", "eval_iters=0", "lr=0.05")
    plain = workers.run("train_with_cli", 1, overrides=settings)[0]
    dropped = [workers.run("train_with_cli", 1, overrides=[*settings, "lora_dropout=0.3"])[0] for _ in range(2)]
    assert dropped[0] == dropped[1]
    assert dropped[0][-1] != plain[-1]


def test_a_checkpoint_says_what_it_is(
    workers: WorkerPool, base_dir: Path, task_files: list[Path], tmp_path: Path
) -> None:
    from malora_dist.checkpoint.adapter import read_adapter_info
    from malora_dist.checkpoint.base import checkpoint_dir, read_base_info
    from malora_dist.config_file import load_config

    settings = overrides(base_dir, task_files, "train_iters=2", "eval_iters=0", f"save={tmp_path}", "save_interval=1")
    workers.run("train_with_cli", 1, overrides=settings)
    assert sorted(p.name for p in tmp_path.glob("iter_*")) == ["iter_0000001", "iter_0000002"]
    directory = checkpoint_dir(tmp_path)
    info = read_adapter_info(directory)
    assert (info.iteration, info.num_layers, info.spec.lora_rank) == (2, 2, 4)
    assert info.base_fingerprint == read_base_info(base_dir).fingerprint
    assert load_config(directory / "config.yaml").lr == 0.01


def test_what_only_a_mixture_has_does_not_bind_a_lora(
    workers: WorkerPool, base_dir: Path, task_files: list[Path], tmp_path: Path
) -> None:
    settings = overrides(base_dir, task_files, "method=lora", "eval_iters=0", f"save={tmp_path}")
    workers.run("train_with_cli", 1, overrides=[*settings, "train_iters=1"])
    more = [*settings, "train_iters=2", "num_lora_experts=2", "shared_dim=9", f"load={tmp_path}"]
    assert [i for i, _ in workers.run("train_with_cli", 1, overrides=more)[0]] == [2]
