"""Checkpoints of one megatron-core version under another; the common state lies where each version keeps it."""

from __future__ import annotations

from pathlib import Path

import pytest

from malora_dist.checkpoint.base import checkpoint_dir
from malora_dist.checkpoint.torch_dist import TorchDistReader
from malora_dist.errors import CheckpointError
from malora_dist.parallel import compatibility
from malora_dist.parallel.compatibility import check_common_state, keeps_common_state_inside
from tests.test_errors import run_arguments, run_process

INSIDE = {"common_state/shard_0_1", "rng/shard_0_1"}


@pytest.fixture(params=["0.18.2", "0.19.0"])
def installed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The megatron-core version that seems to be installed."""
    monkeypatch.setattr(compatibility, "version", lambda name: request.param)
    return str(request.param)


@pytest.mark.parametrize("objects", [set(), INSIDE])
def test_every_version_reads_a_file(objects: set[str], installed: str, tmp_path: Path) -> None:
    (tmp_path / "common.pt").touch()
    check_common_state(tmp_path, objects)


def test_an_object_inside_is_for_newer_versions(installed: str, tmp_path: Path) -> None:
    if installed == "0.19.0":
        check_common_state(tmp_path, INSIDE)
        return
    with pytest.raises(CheckpointError, match=r"written with megatron-core 0\.19 or newer, which 0\.18\.2 cannot read"):
        check_common_state(tmp_path, INSIDE)


def test_neither_is_half_a_checkpoint(installed: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is half-written, common\.pt is missing"):
        check_common_state(tmp_path, {"rng/shard_0_1"})


def test_a_run_with_the_installed_version(base_dir: Path, task_files: list[Path], tmp_path: Path) -> None:
    """The common state is written where it is looked for, and megatron's own warnings do not reach the user."""
    ended = run_process("-m", "malora_dist.train", *run_arguments(base_dir, task_files[0], tmp_path))
    assert (ended.code, ended.stderr) == (0, "")
    directory = checkpoint_dir(tmp_path)
    objects = TorchDistReader(directory).objects
    check_common_state(directory, objects)
    assert (directory / "common.pt").is_file() != keeps_common_state_inside()
    assert ("common_state/shard_0_1" in objects) == keeps_common_state_inside()
