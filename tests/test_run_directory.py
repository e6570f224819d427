"""The `save` directory: which checkpoint is taken, how one appears, and how old ones go."""

from __future__ import annotations

from pathlib import Path

import pytest

from malora_dist.checkpoint import run_directory
from malora_dist.checkpoint.base import TRACKER_FILE
from malora_dist.errors import CheckpointError, ConfigError


def fill(save: Path, *iterations: int, tracker: str | None = None) -> Path:
    for iteration in iterations:
        run_directory.start_writing(save, iteration)
        (run_directory.partial_directory(save, iteration) / "file").write_text(f"{iteration}")
        run_directory.publish(save, iteration)
    if tracker is not None:
        (save / TRACKER_FILE).write_text(tracker)
    return save


def names(save: Path) -> list[str]:
    return sorted(entry.name for entry in save.iterdir())


def test_a_checkpoint_appears_by_one_rename(tmp_path: Path) -> None:
    run_directory.start_writing(tmp_path, 5)
    assert run_directory.iterations(tmp_path) == []
    assert names(tmp_path) == [".iter_0000005.partial"]
    run_directory.publish(tmp_path, 5)
    assert names(tmp_path) == ["iter_0000005", TRACKER_FILE]


def test_one_of_the_same_iteration_is_replaced(tmp_path: Path) -> None:
    fill(tmp_path, 5)
    run_directory.start_writing(tmp_path, 5)
    run_directory.publish(tmp_path, 5)
    assert names(tmp_path) == ["iter_0000005", TRACKER_FILE]
    assert names(tmp_path / "iter_0000005") == []


def test_what_a_kill_leaves_is_swept(tmp_path: Path) -> None:
    """Also between the two renames of a replacement, when the checkpoint has no name for a moment."""
    fill(tmp_path, 5, 6)
    run_directory.start_writing(tmp_path, 7)
    (tmp_path / "iter_0000006").rename(tmp_path / ".iter_0000006.displaced")
    (tmp_path / ".iter_0000004.removed").mkdir()
    (tmp_path / ".iter_mine").mkdir()
    run_directory.sweep(tmp_path)
    assert names(tmp_path) == [".iter_mine", "iter_0000005", "iter_0000006", TRACKER_FILE]
    assert (tmp_path / "iter_0000006" / "file").read_text() == "6"


def test_the_tracker_decides_and_the_newest_follow(tmp_path: Path) -> None:
    fill(tmp_path, 5, 10, 15, tracker="10\n")
    directories, notes = run_directory.candidates(tmp_path)
    assert [directory.name for directory in directories] == ["iter_0000010", "iter_0000005", "iter_0000015"]
    assert len(notes) == 1
    assert "names iteration 10, iteration 15 is left alone" in notes[0]
    (tmp_path / TRACKER_FILE).write_text("15")
    assert run_directory.candidates(tmp_path)[1] == []


@pytest.mark.parametrize("tracker", ["", "ten", "12", "-5", "5 10", "\udcff", "9" * 30, "\u0665"])
def test_a_damaged_tracker_is_told_and_the_newest_taken(tmp_path: Path, tracker: str) -> None:
    fill(tmp_path, 5, 10)
    (tmp_path / TRACKER_FILE).write_bytes(tracker.encode(errors="surrogateescape"))
    directories, notes = run_directory.candidates(tmp_path)
    assert directories[0].name == "iter_0000010"
    assert len(notes) == 1
    (tmp_path / TRACKER_FILE).unlink()
    assert run_directory.candidates(tmp_path)[0] == directories


def test_no_checkpoint_is_an_error(tmp_path: Path) -> None:
    for make in (lambda: None, lambda: (tmp_path / TRACKER_FILE).write_text("5")):
        make()
        with pytest.raises(CheckpointError, match=r"is not a checkpoint|holds no checkpoint"):
            run_directory.candidates(tmp_path)
    with pytest.raises(CheckpointError, match="is not a directory"):
        run_directory.candidates(tmp_path / "absent")


def test_one_iteration_can_be_named(tmp_path: Path) -> None:
    fill(tmp_path, 5, 10)
    assert run_directory.candidates(tmp_path / "iter_0000005") == ([tmp_path / "iter_0000005"], [])


def test_old_ones_go_but_the_best_stays(tmp_path: Path) -> None:
    fill(tmp_path, 5, 10, 15, 20, 25)
    run_directory.name_best(tmp_path, 10)
    run_directory.remove_old(tmp_path, 20, 0, best=10)
    assert run_directory.iterations(tmp_path) == [5, 10, 15, 20, 25]
    run_directory.remove_old(tmp_path, 20, 2, best=10)  # 25 is of the run before, which went further
    assert run_directory.iterations(tmp_path) == [10, 15, 20, 25]
    run_directory.remove_all(tmp_path)
    assert names(tmp_path) == []


def test_another_runs_save_is_refused(tmp_path: Path) -> None:
    run_directory.check_free(tmp_path)
    fill(tmp_path, 5)
    with pytest.raises(ConfigError, match=r"save=.*holds checkpoints of another run.*resume=auto.*overwrite=true"):
        run_directory.check_free(tmp_path)
