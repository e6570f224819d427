"""Checkpoints that are damaged, replaced, removed, or cannot be written: what a run makes of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from malora_dist.checkpoint.base import TRACKER_FILE
from malora_dist.checkpoint.convert import export_hf, read_adapter_weights
from malora_dist.checkpoint.inspection import inspect
from malora_dist.errors import CheckpointError
from tests.jobs_checkpoints import Ended
from tests.test_parity import overrides
from tests.workers import WorkerPool

EP_2 = ["expert_model_parallel_size=2"]


@pytest.fixture(scope="module")
def finished(
    workers: WorkerPool, base_dir: Path, task_files: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The `save` of a run on two ranks, with checkpoints of iterations 1, 2 and 3."""
    save = tmp_path_factory.mktemp("checkpoints") / "save"
    run(workers, 2, *settings(base_dir, task_files, save, "save_interval=1", "train_iters=3"))
    return save


def settings(base: Path, task_files: list[Path], save: Path, *more: str) -> list[str]:
    return [*overrides(base, task_files, *EP_2, "eval_iters=0"), f"save={save}", *more]


def run(workers: WorkerPool, processes: int, *arguments: str) -> Ended:
    """The first rank's end, all ranks having ended alike."""
    ends = workers.run("jobs_errors:train_main", processes, arguments=list(arguments))
    assert len({end.code for end in ends}) == 1, ends
    return ends[0]


def names(save: Path) -> list[str]:
    return sorted(entry.name for entry in save.glob("*iter*") if entry.is_dir())


def flip(file: Path, position: int = -3) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 4
    file.write_bytes(content)


def test_a_damaged_checkpoint_is_passed_over(
    workers: WorkerPool, base_dir: Path, task_files: list[Path], finished: Path, tmp_path: Path
) -> None:
    """In the tensors of one rank and in the small files; the run goes on from the newest sound one and says so."""
    save = shutil.copytree(finished, tmp_path / "save")
    flip(save / "iter_0000003" / "__1_0.distcp")
    flip(save / "iter_0000002" / "adapter.json")
    ended = run(workers, 2, *settings(base_dir, task_files, save, f"load={save}", "train_iters=4"))
    assert ended.code == 0, ended.stderr
    assert "__1_0.distcp: is damaged" in ended.stdout
    assert "iter_0000002/adapter.json: is damaged" in ended.stdout
    assert f"loaded {save}/iter_0000001, going on at iteration 1" in ended.stdout
    told: list[str] = []
    flip(save / "iter_0000004" / "common.pt")
    assert read_adapter_weights(save, told.append).iteration == 1
    assert len(told) == 3
    findings = {finding.directory.name: finding.fault for finding in inspect(save)}
    assert [name for name, fault in findings.items() if not fault] == [TRACKER_FILE, "iter_0000001"]


def test_a_kill_before_the_first_tracker_file_is_no_damage(finished: Path, tmp_path: Path) -> None:
    save = shutil.copytree(finished, tmp_path / "save")
    (save / TRACKER_FILE).unlink()
    assert [finding.fault for finding in inspect(save)] == [""] * 4
    assert read_adapter_weights(save, list[str]().append).iteration == 3
    (save / TRACKER_FILE).write_text("7\n")
    assert "iter_0000007 named by" in next(inspect(save)).fault


def test_nothing_sound_is_an_error(
    workers: WorkerPool, base_dir: Path, task_files: list[Path], finished: Path, tmp_path: Path
) -> None:
    """Also with resume=auto, which does not begin anew over what is there."""
    save = shutil.copytree(finished, tmp_path / "save")
    for directory in save.glob("iter_*"):
        (directory / "common.pt").write_bytes(b"")
    ended = run(workers, 2, *settings(base_dir, task_files, save, "resume=auto"))
    assert ended.code == 2
    assert "iter_0000003/common.pt: is cut off or damaged, has 0 bytes" in ended.stderr
    assert "(and 2 older ones are damaged too)" in ended.stderr


@pytest.mark.parametrize(
    "file", ["iter_0000000/__3_0.distcp", "hf/tokenizer.json", "hf/config.json", "malora_base.json"]
)
def test_a_damaged_base_is_named(
    workers: WorkerPool, base_dir: Path, task_files: list[Path], tmp_path: Path, file: str
) -> None:
    """Before training, and before an export."""
    base = shutil.copytree(base_dir, tmp_path / "base")
    flip(base / file)
    ended = run(workers, 2, *settings(base, task_files, tmp_path / "save"))
    assert ended.code == 2
    assert f"{base / file}: is damaged" in ended.stderr
    with pytest.raises(CheckpointError, match=f"{file}: is damaged"):
        export_hf(base, tmp_path / "export")
    (finding,) = inspect(base)
    assert f"{file}: is damaged" in finding.fault


@pytest.mark.parametrize("has_manifest", [True, False])
def test_a_base_without_its_description_is_named(base_dir: Path, tmp_path: Path, has_manifest: bool) -> None:
    """It is not taken for a run's `save`."""
    base = shutil.copytree(base_dir, tmp_path / "base")
    for name in ("malora_base.json", *(() if has_manifest else ("manifest.json",))):
        (base / name).unlink()
    (finding,) = inspect(base)
    assert "malora_base.json" in finding.fault


def test_another_runs_checkpoints_are_not_overwritten(
    workers: WorkerPool, base_dir: Path, task_files: list[Path], finished: Path, tmp_path: Path
) -> None:
    save = shutil.copytree(finished, tmp_path / "save")
    anew = settings(base_dir, task_files, save, "train_iters=1")
    ended = run(workers, 2, *anew)
    assert ended.code == 2
    assert "holds checkpoints of another run, the newest iter_0000003" in ended.stderr
    assert names(save) == ["iter_0000001", "iter_0000002", "iter_0000003"]
    (save / "metrics.jsonl").write_text("of the former run\n")
    assert run(workers, 2, *anew, "overwrite=true").code == 0
    assert not (save / "metrics.jsonl").exists() or "of the former run" not in (save / "metrics.jsonl").read_text()
    assert names(save) == ["iter_0000001"]


def test_resume_auto_begins_and_goes_on(
    workers: WorkerPool, base_dir: Path, task_files: list[Path], finished: Path, tmp_path: Path
) -> None:
    """One command for a run and for its restarts; what is kept besides is what `keep_last` says."""
    save = tmp_path / "save"
    command = settings(base_dir, task_files, save, "resume=auto", "save_interval=1", "train_iters=3", "keep_last=2")
    for last in ("exit_interval=2", "exit_interval=3"):
        assert run(workers, 2, *command, last).code == 0
    assert names(save) == ["iter_0000002", "iter_0000003"]
    undisturbed, interrupted = (read_adapter_weights(directory).tensors for directory in (finished, save))
    for key, tensor in undisturbed.items():
        assert torch.equal(tensor, interrupted[key]), key


def test_async_save_writes_the_same(
    workers: WorkerPool, base_dir: Path, task_files: list[Path], finished: Path, tmp_path: Path
) -> None:
    """Although training went on meanwhile; and a run that stops at once has its last checkpoint."""
    save = tmp_path / "save"
    command = settings(base_dir, task_files, save, "save_interval=1", "train_iters=3", "async_save=true")
    assert run(workers, 2, *command).code == 0
    assert names(save) == names(finished)
    for name in names(save):
        synchronous, asynchronous = (read_adapter_weights(d / name).tensors for d in (finished, save))
        for key, tensor in synchronous.items():
            assert torch.equal(tensor, asynchronous[key]), (name, key)


def test_a_checkpoint_without_its_manifest_is_not_whole(
    workers: WorkerPool, base_dir: Path, task_files: list[Path], finished: Path, tmp_path: Path
) -> None:
    save = shutil.copytree(finished, tmp_path / "save")
    (save / "iter_0000003" / "manifest.json").unlink()
    (save / "latest_checkpointed_iteration.txt").write_text("")
    ended = run(workers, 2, *settings(base_dir, task_files, save, "resume=auto", "train_iters=3"))
    assert "passed over: " in ended.stdout
    assert "iter_0000003: is half-written, manifest.json is missing" in ended.stdout
    assert "holds '', must be the number of an iteration" in ended.stdout
    assert "going on at iteration 2" in ended.stdout


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(("fault", "rank"), [("full", 0), ("full", 1), ("vanished", 0)])
def test_a_disk_that_fails(
    workers: WorkerPool, base_dir: Path, task_files: list[Path], tmp_path: Path, fault: str, rank: int, is_async: bool
) -> None:
    """One line on every rank and exit code 2, or on to the next checkpoint; those before are sound."""
    save = tmp_path / "save"
    command = settings(
        base_dir,
        task_files,
        save,
        "save_interval=1",
        "train_iters=3",
        f"async_save={is_async}",
        f"tensorboard_dir={tmp_path}",
    )
    disk = {"fault": fault, "save": str(save), "at": 2, "rank": rank}
    ends = workers.run("jobs_checkpoints:train_on_a_bad_disk", 2, arguments=command, **disk)
    assert [end.code for end in ends] == [2, 2], ends
    assert f"save='{save}': cannot be written" in ends[0].stderr
    assert names(save) == ([] if fault == "vanished" else ["iter_0000001"])
    assert all(not finding.fault for finding in (inspect(save) if fault == "full" else ()))
    if fault == "vanished":
        return
    ends = workers.run(
        "jobs_checkpoints:train_on_a_bad_disk",
        2,
        arguments=[*command, "on_save_error=continue", "overwrite=true"],
        **disk,
    )
    assert [end.code for end in ends] == [0, 0], ends
    assert names(save) == ["iter_0000001", "iter_0000003"]
    assert all(not finding.fault for finding in inspect(save))


def test_a_save_that_cannot_be_is_refused_before_the_first_step(
    workers: WorkerPool, base_dir: Path, task_files: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    ended = run(workers, 2, *settings(base_dir, task_files, tmp_path / "file" / "save"))
    assert ended.code == 2
    assert "cannot be written (Not a directory)" in ended.stderr


def test_differences_are_listed_and_changed_data_is_refused(
    workers: WorkerPool, base_dir: Path, task_files: list[Path], finished: Path, tmp_path: Path
) -> None:
    files = [Path(shutil.copy(file, tmp_path)) for file in task_files]
    resume = [f"load={finished}", "train_iters=4"]
    ended = run(workers, 2, *settings(base_dir, files, tmp_path / "a", *resume, "lr=0.5", "clip_grad=2"))
    assert ended.code == 0, ended.stderr
    assert "not as in the checkpoint: lr: 0.01 -> 0.5" in ended.stdout
    assert "clip_grad: 1.0 -> 2.0" in ended.stdout
    assert "weight_decay" not in ended.stdout.partition("loaded")[0].partition("not as in")[2]
    seed = run(workers, 2, *settings(base_dir, files, tmp_path / "b", *resume, "seed=77"))
    assert seed.code == 2
    assert "allow_changed_data=False: which samples of task" in seed.stderr
    assert "seed: 1234 -> 77" in seed.stderr
    lines = files[0].read_text().splitlines(keepends=True)
    files[0].write_text("".join([*lines[1:], lines[0]]))
    changed = run(workers, 2, *settings(base_dir, files, tmp_path / "c", *resume))
    assert changed.code == 2
    assert f"the content of {files[0]} (task {files[0].stem}) has changed" in changed.stderr
    accepted = run(workers, 2, *settings(base_dir, files, tmp_path / "d", *resume, "allow_changed_data=true"))
    assert accepted.code == 0, accepted.stderr
    renamed = run(workers, 2, *settings(base_dir, files, tmp_path / "e", *resume, "data[0].name=other"))
    assert "the tasks are no longer" in renamed.stderr


@pytest.mark.parametrize("sharded", [False, True])
def test_a_checkpoint_before_the_first_update_can_be_resumed(
    workers: WorkerPool, base_dir: Path, task_files: list[Path], tmp_path: Path, sharded: bool
) -> None:
    """As when the first step is skipped; AdamW has no moments of its own accord by then."""
    keys = [*EP_2, "eval_iters=0", "train_iters=2", f"use_distributed_optimizer={sharded}"]
    command = overrides(base_dir, task_files, *keys)
    whole = workers.run("train_with_cli", 2, overrides=command)
    workers.run("jobs_checkpoints:save_at_once", 2, overrides=[*command, f"save={tmp_path}"])
    assert names(tmp_path) == ["iter_0000000"]
    assert workers.run("train_with_cli", 2, overrides=[*command, f"load={tmp_path}"]) == whole


def test_the_best_checkpoint_is_known_after_a_resume(
    workers: WorkerPool, base_dir: Path, task_files: list[Path], tmp_path: Path
) -> None:
    """Whatever became of the file that names it: each checkpoint says what was the best when it was written."""
    save = tmp_path / "save"
    keys = ["save_interval=1", "eval_interval=1", "eval_iters=2", "keep_best=true", "keep_last=1", "resume=auto"]
    command = [*overrides(base_dir, task_files, *EP_2, *keys, "train_iters=4"), f"save={save}"]
    assert run(workers, 2, *command, "exit_interval=2", "lr=0.01").code == 0
    named = int((save / "best_checkpointed_iteration.txt").read_text())
    (save / "best_checkpointed_iteration.txt").write_bytes(b"\xff")
    ended = run(workers, 2, *command, "lr=30", "clip_grad=0")  # from here on it gets worse
    assert ended.code == 0, ended.stderr
    assert int((save / "best_checkpointed_iteration.txt").read_text()) == named
    assert names(save) == sorted({f"iter_{named:07d}", "iter_0000004"})


def test_copies_of_a_base_of_which_one_has_no_manifest(
    workers: WorkerPool, base_dir: Path, task_files: list[Path], tmp_path: Path
) -> None:
    """Machines with disks of their own: no rank waits for another, and what is not verified is told."""
    for rank in range(2):
        shutil.copytree(base_dir, tmp_path / f"base{rank}")
    (tmp_path / "base1" / "manifest.json").unlink()
    command = settings(Path(f"{tmp_path}/base$RANK"), task_files, tmp_path / "save", "train_iters=1")
    ended = run(workers, 2, *command)
    assert ended.code == 0, ended.stderr
    assert "base1: an earlier version converted it, so its content cannot be verified" in ended.stdout
    flip(tmp_path / "base0" / "iter_0000000" / ".metadata")
    damaged = run(workers, 2, *command)
    assert damaged.code == 2
    assert ".metadata: is damaged" in damaged.stderr


@pytest.mark.parametrize(
    ("file", "content"), [("common.pt", b""), ("common.pt", b"PK"), ("metadata.json", b""), ("metadata.json", b"[]")]
)
def test_damage_without_a_manifest_is_one_line(finished: Path, tmp_path: Path, file: str, content: bytes) -> None:
    """Of a checkpoint that an earlier version wrote; the one before is taken."""
    save = shutil.copytree(finished, tmp_path / "save")
    newest = save / "iter_0000003"
    (newest / "manifest.json").unlink()
    text = (newest / "adapter.json").read_text().replace('"format_version": 3', '"format_version": 2')
    (newest / "adapter.json").write_text(text)
    assert read_adapter_weights(save, list[str]().append).iteration == 3
    (newest / file).write_bytes(content)
    told: list[str] = []
    assert read_adapter_weights(save, told.append).iteration == 2
    assert f"{file}: is" in told[0]


def test_what_resume_auto_makes_useless_is_told(
    workers: WorkerPool, base_dir: Path, task_files: list[Path], finished: Path, tmp_path: Path
) -> None:
    save = shutil.copytree(finished, tmp_path / "save")
    more = [f"load={finished / 'iter_0000001'}", "overwrite=true", "resume=auto", "train_iters=3"]
    ended = run(workers, 2, *settings(base_dir, task_files, save, *more))
    assert "iter_0000001' has no effect: resume=auto goes on from" in ended.stdout
    assert "overwrite=true has no effect" in ended.stdout
    assert names(save) == names(finished)
