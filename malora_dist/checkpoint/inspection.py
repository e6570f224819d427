"""Whether a converted base, or every checkpoint of a run, is still what was written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from malora_dist.checkpoint.base import (
    HF_FOLDER,
    INFO_FILE,
    TRACKER_FILE,
    checkpoint_dir,
    has_manifest,
    read_base_info,
)
from malora_dist.checkpoint.manifest import read_manifest, verify
from malora_dist.checkpoint.run_directory import candidates
from malora_dist.errors import CheckpointError
from malora_dist.parallel.device import without_expected_warnings


class Finding(NamedTuple):
    """About a base, or one checkpoint of a run.

    Attributes:
        fault: empty: it is sound.
        report: of a sound one, in a few words.
    """

    directory: Path
    fault: str
    report: str


def inspect(path: Path) -> Iterator[Finding]:
    """Read everything in a directory and compare it with the manifest.

    Args:
        path: a converted base, a run's `save`, or one `iter_*` directory in it.

    Raises:
        CheckpointError: it is none of these.
    """
    if (path / INFO_FILE).is_file() or (path / HF_FOLDER).is_dir():  # a base also if it has lost one of them
        yield _inspect_base(path)
        return
    directories, _ = candidates(path)
    if directories != [path]:
        yield _inspect_tracker(path)
    with without_expected_warnings():  # imports megatron
        from malora_dist.checkpoint.adapter import check_whole
    for directory in directories:
        try:
            info = check_whole(directory)
            yield Finding(directory, "", _report(directory) if info.format_version >= 3 else _UNVERIFIED)
        except CheckpointError as error:
            yield Finding(directory, str(error), "")


_UNVERIFIED = "complete; an earlier version wrote it without a manifest, so its content cannot be verified"


def _inspect_base(path: Path) -> Finding:
    try:
        if has_manifest(path):
            verify(path, threads=os.cpu_count() or 1)
        read_base_info(path)
    except CheckpointError as error:
        return Finding(path, str(error), "")
    return Finding(path, "", _report(path) if has_manifest(path) else _UNVERIFIED)


def _inspect_tracker(path: Path) -> Finding:
    if not (path / TRACKER_FILE).exists():  # killed while the first checkpoint was published, after its rename
        return Finding(path / TRACKER_FILE, "", "is missing; the newest checkpoint counts")
    try:
        return Finding(path / TRACKER_FILE, "", f"names {checkpoint_dir(path).name}")
    except CheckpointError as error:
        return Finding(path / TRACKER_FILE, str(error), "")


def _report(directory: Path) -> str:
    manifest = read_manifest(directory)
    size = sum(size for size, _ in manifest.values())
    return f"sound, {len(manifest)} files with {size / 1e9:.3g} GB"
