"""The manifest of a finished directory: size and SHA-256 of every file in it, so that a damaged byte is found.

    DIR/manifest.json    {"format_version": 1,
                          "files": {"iter_0000000/.metadata": {"bytes": 812, "sha256": "..."}, ...},
                          "sha256": that of "files" as compact JSON with sorted keys}

It is written last. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from malora_dist.errors import CheckpointError

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 1
_CURE = "copy it again or use another checkpoint"

#: {path relative to the directory: (bytes, SHA-256)}.
Manifest = dict[str, tuple[int, str]]


def write_manifest(directory: Path) -> None:
    """Write the manifest of what is in ``directory``, and force all of it to the disk."""
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    with ThreadPoolExecutor() as pool:
        digests = dict(zip(files, pool.map(_digest, files), strict=True))
    entries = {
        file.relative_to(directory).as_posix(): {"bytes": file.stat().st_size, "sha256": digest}
        for file, digest in digests.items()
    }
    manifest = {"format_version": FORMAT_VERSION, "files": entries, "sha256": _seal(entries)}
    (directory / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for file in [*files, directory / MANIFEST_FILE]:
        sync(file)
    for folder in {file.parent for file in files} | {directory}:
        sync(folder)


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a directory, itself checked.

    Raises:
        CheckpointError: it is missing or damaged, or names a file outside of the directory.
    """
    file = directory / MANIFEST_FILE
    if not file.is_file():
        raise CheckpointError(f"{directory}: is half-written, {MANIFEST_FILE} is missing; {_CURE}")
    try:
        raw = json.loads(file.read_bytes())
        entries = raw["files"]
        is_intact = raw["format_version"] == FORMAT_VERSION and raw["sha256"] == _seal(entries)
        manifest = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: is cut off or damaged ({error!r}); {_CURE}") from error
    if not is_intact:
        raise CheckpointError(f"{file}: is damaged, it does not agree with itself; {_CURE}")
    for name in manifest:
        check_inside(directory, name)
    return manifest


def verify(directory: Path, part: int = 0, parts: int = 1, sizes: range | None = None, threads: int = 1) -> None:
    """Check every file that the manifest names, or this caller's part of them.

    Args:
        part, parts: of several callers, such as the ranks of a node, each takes its share of the bytes.
        sizes: only files of so many bytes; default: all.
        threads: that read; one reads 0.5 to 2 GB/s.

    Raises:
        CheckpointError: naming the first file that is missing or damaged.
    """
    manifest = read_manifest(directory)
    wanted = [name for name, (size, _) in manifest.items() if sizes is None or size in sizes]
    by_size = sorted(wanted, key=lambda name: (-manifest[name][0], name))
    mine = by_size[part::parts]

    def fault_of(name: str) -> str:
        return _fault(directory / name, *manifest[name])

    with ThreadPoolExecutor(threads) if threads > 1 else contextlib.nullcontext() as pool:
        for fault in pool.map(fault_of, mine) if pool else map(fault_of, mine):
            if fault:
                raise CheckpointError(f"{fault}; {_CURE}")


def _fault(file: Path, size: int, sha256: str) -> str:
    """What is wrong with a file; empty: nothing."""
    if not file.is_file():
        return f"{file}: is missing, but {MANIFEST_FILE} names it"
    try:
        if file.stat().st_size != size:
            return f"{file}: is cut off or damaged, has {file.stat().st_size} bytes, {MANIFEST_FILE} says {size}"
        if _digest(file) != sha256:
            return f"{file}: is damaged, its SHA-256 is not the one in {MANIFEST_FILE}"
    except OSError as error:
        return f"{file}: cannot be read ({error.strerror})"
    return ""


def check_inside(directory: Path, name: str) -> None:
    """Refuse the name of a file that would lead out of the directory.

    Raises:
        CheckpointError: an absolute path, or one with `..` in it.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise CheckpointError(f"{directory}: names a file outside of itself, {name!r}; do not use this checkpoint")


def sync(path: Path) -> None:
    """Force a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text_durably(file: Path, text: str) -> None:
    """Replace a small file by one rename: a reader, or the next start, sees the old text or the new."""
    aside = file.with_name(f".{file.name}.partial")
    aside.write_text(text, encoding="utf-8")
    sync(aside)
    aside.replace(file)
    sync(file.parent)


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _seal(entries: object) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
