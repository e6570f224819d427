"""The `save` directory of a run: which checkpoints it holds, how one appears in it, and how old ones go.

SAVE/
    latest_checkpointed_iteration.txt   the newest checkpoint
    best_checkpointed_iteration.txt     with `keep_best`: the one of the best validation
    iter_0000100/                       a complete checkpoint: it got this name by one rename
    .iter_0000200.partial/              one that is being written, or was when the run was killed
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from malora_dist.checkpoint.base import TRACKER_FILE, iteration_name, read_tracker
from malora_dist.checkpoint.manifest import sync, write_text_durably
from malora_dist.errors import CheckpointError, ConfigError

BEST_FILE = "best_checkpointed_iteration.txt"

_ITERATION = re.compile(r"iter_(\d{7,})")
#: States of what is not a checkpoint (any more): being written, displaced by another of its iteration, being removed.
_PARTIAL = "partial"
_DISPLACED = "displaced"
_REMOVED = "removed"


def iterations(save: Path) -> list[int]:
    """The checkpoints in a directory, oldest first; none, if it is not there."""
    names = (_ITERATION.fullmatch(entry.name) for entry in save.glob("iter_*") if entry.is_dir())
    return sorted(int(name[1]) for name in names if name)


def candidates(path: Path) -> tuple[list[Path], list[str]]:
    """The checkpoints that a run may start from, the one to try first in front.

    Args:
        path: a `save` directory, or one `iter_*` directory in it.

    Returns:
        the directories: that which the tracker file names, then the others from the newest on, those that are older
        than it first; and what is odd.

    Raises:
        CheckpointError: there is none.
    """
    if _ITERATION.fullmatch(path.name) and path.is_dir():
        return [path], []
    found = iterations(path)
    if not found:
        read_tracker(path)  # says what is wrong
        raise CheckpointError(f"{path}: holds no checkpoint, though {TRACKER_FILE} names one; copy it again")
    try:
        named = read_tracker(path)
        notes = []
    except CheckpointError as error:
        named, notes = -1, [str(error)]
    limit = named if named in found else found[-1]  # what is newer belongs to a run that was given up
    order = sorted(found, key=lambda iteration: (iteration <= limit, iteration), reverse=True)
    if named not in found and not notes:
        notes = [f"{path}: {TRACKER_FILE} names iteration {named}, which is not there"]
    elif 0 <= named < found[-1]:
        notes = [f"{path}: {TRACKER_FILE} names iteration {named}, iteration {found[-1]} is left alone"]
    return [path / iteration_name(iteration) for iteration in order], notes


def sweep(save: Path) -> None:
    """Clear what a run that was killed has left half-done, as far as the disk allows."""
    for entry in save.glob(".iter_*"):
        name, _, state = entry.name[1:].rpartition(".")
        if state == _DISPLACED and not (save / name).exists():
            entry.rename(save / name)  # killed between the two renames of publish
        elif state in (_PARTIAL, _DISPLACED, _REMOVED):
            shutil.rmtree(entry, ignore_errors=True)


def partial_directory(save: Path, iteration: int) -> Path:
    """Where the files of a checkpoint are written."""
    return _aside(save, iteration, _PARTIAL)


def start_writing(save: Path, iteration: int) -> None:
    """Make :func:`partial_directory`, empty; `save` itself has to be there still."""
    directory = partial_directory(save, iteration)
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir()


def abandon(save: Path, iteration: int) -> None:
    """Give up what :func:`start_writing` began, as far as the disk allows."""
    shutil.rmtree(partial_directory(save, iteration), ignore_errors=True)


def publish(save: Path, iteration: int) -> Path:
    """Give a finished checkpoint its name and make it the newest; a kill at any point leaves the old one or the new."""
    directory = save / iteration_name(iteration)
    displaced = _aside(save, iteration, _DISPLACED)
    if directory.exists():
        directory.rename(displaced)
    partial_directory(save, iteration).rename(directory)
    sync(save)
    write_text_durably(save / TRACKER_FILE, f"{iteration}\n")
    shutil.rmtree(displaced, ignore_errors=True)
    return directory


def remove_old(save: Path, newest: int, keep_last: int, best: int | None = None) -> None:
    """Remove checkpoints before the ``keep_last`` newest up to ``newest``, but not the best one; 0 keeps all."""
    older = [iteration for iteration in iterations(save) if iteration <= newest]
    for iteration in older[:-keep_last] if keep_last else []:
        if iteration != best:
            _remove(save, iteration)


def remove_all(save: Path) -> None:
    """Remove every checkpoint of a former run, and the files that name them."""
    for file in (TRACKER_FILE, BEST_FILE):
        (save / file).unlink(missing_ok=True)
    for iteration in iterations(save):
        _remove(save, iteration)


def name_best(save: Path, iteration: int | None) -> None:
    """Name the best checkpoint; None: there is none."""
    if iteration is None:
        (save / BEST_FILE).unlink(missing_ok=True)
    else:
        write_text_durably(save / BEST_FILE, f"{iteration}\n")


def check_free(save: Path) -> None:
    """Refuse the `save` of a run that does not go on from there, where another run has its checkpoints.

    Raises:
        ConfigError: naming what is there.
    """
    found = iterations(save)
    if found:
        raise ConfigError(
            "save",
            str(save),
            f"holds checkpoints of another run, the newest {iteration_name(found[-1])}",
            "set resume=auto or load to go on from it, name another directory, or set overwrite=true to remove them",
        )


def _remove(save: Path, iteration: int) -> None:
    removed = _aside(save, iteration, _REMOVED)
    (save / iteration_name(iteration)).rename(removed)  # so that half of it is never taken for a checkpoint
    shutil.rmtree(removed, ignore_errors=True)  # what stays is swept by the next run


def _aside(save: Path, iteration: int, state: str) -> Path:
    return save / f".{iteration_name(iteration)}.{state}"
