"""Paths that a user names: looked at before they are opened, and never replaced unless they are this project's own."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from malora_dist.errors import CheckpointError, MaloraError, first_line


def path_argument(text: str) -> Path:
    """The type of argparse options that are paths.

    Raises:
        ArgumentTypeError: blank, as an unset shell variable is; ``Path("")`` would be the working directory.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is blank, perhaps an unset shell variable; name a path")
    return Path(text)


def stem_of(path: str | Path) -> str:
    """The file's name without its ending, ``.gz`` being no ending of its own."""
    stem = Path(path).stem
    return Path(stem).stem if Path(path).suffix.lower() == ".gz" else stem


def is_regular_file(path: str | Path) -> bool:
    """Whether it is a file that can be looked at: no device, FIFO, loop of links or impossible name; opens nothing."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):  # ValueError: a NUL or half a surrogate pair in the name
        return False


def is_same_file(a: str, b: str) -> bool:
    """Whether two names lead to one file, by links or otherwise; equal names do, be there a file or not."""
    try:
        return a == b or os.path.samefile(a, b)
    except (OSError, ValueError):
        return False


def resolved(path: str | Path) -> Path:
    """The absolute path, links followed.

    Raises:
        CheckpointError: blank, a loop of links, or no possible name.
    """
    if not str(path).strip():
        raise CheckpointError(f"{str(path)!r}: is no path; name a directory")
    try:
        return Path(path).resolve()
    except (OSError, RuntimeError, ValueError) as problem:
        raise CheckpointError(f"{str(path)!r}: cannot be followed ({first_line(problem)}); name another") from problem


def read_file(file: Path, error: type[MaloraError], cure: str) -> bytes:
    """The content of a regular file.

    Raises:
        error: missing, not a regular file or not readable.
    """
    if not is_regular_file(file):
        raise error(f"{file}: is missing or not a regular file; {cure}")
    try:
        return file.read_bytes()
    except OSError as problem:
        raise error(f"{file}: cannot be read ({problem.strerror}); {cure}") from problem


def read_json_object(file: Path, error: type[MaloraError], cure: str) -> dict[str, Any]:
    """A file that holds one JSON object.

    Raises:
        error: as :func:`read_file`, or it holds anything else.
    """
    content = read_file(file, error, cure)
    try:
        raw = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as problem:
        raise error(f"{file}: is not JSON ({first_line(problem)}); {cure}") from problem
    if not isinstance(raw, dict):
        raise error(f"{file}: is not a JSON object; {cure}")
    return raw


@contextmanager
def foreign_reader(
    source: object, cure: str, problem: str = "cannot be read", error: type[MaloraError] = CheckpointError
) -> Iterator[None]:
    """A block in which a library reads what may be damaged; whatever that raises becomes one line.

    transformers, tokenizers, safetensors and PEFT meet damage in the middle of their work, with exceptions of any type;
    a panic of Rust is not even an Exception.

    Args:
        source: the file or directory that is read.
    """
    try:
        yield
    except (MaloraError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as cause:
        raise error(f"{source}: {problem} ({' '.join(first_line(cause).split())}); {cure}") from cause


def file_within(directory: Path, name: object, index: Path) -> Path:
    """The file of a directory that an index names.

    Raises:
        CheckpointError: the name is no plain file name, so that it could lead out of the directory.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or os.sep in name or "\0" in name:
        raise CheckpointError(f"{index}: names the file {name!r}, must be a name in the same directory; copy it again")
    return directory / name


def check_replaceable(target: Path, layout: Collection[str], also_part: bool = False) -> None:
    """Refuse a place where a new directory must not be put.

    Args:
        target: absolute.
        layout: the names that make up an earlier result, which may be replaced when all of them and nothing else is
            there.
        also_part: a part of the layout is an earlier result, too.

    Raises:
        CheckpointError: `target` is a mount point, the home or the working directory, holds one of them, or holds
            anything but an earlier result.
    """
    if target.is_mount():
        raise CheckpointError(f"{target}: is a mount point, which cannot be replaced; name a directory inside it")
    for what, place in (("the working directory", Path.cwd()), ("a home directory", Path.home().resolve())):
        if place.is_relative_to(target):
            raise CheckpointError(f"{target}: is or holds {what}, which is never replaced; name a directory inside it")
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise CheckpointError(f"{target}: is not a directory; name another one")
    found = {entry.name for entry in target.iterdir()}
    if found and found != set(layout) and not (also_part and found <= set(layout)):
        other = min(found - set(layout), default=min(found))
        raise CheckpointError(
            f"{target}: exists and is not an earlier result of this command ({other} is there); "
            "name another directory or remove it"
        )


def put_in_place(new: Path, target: Path) -> None:
    """Give a finished directory its name; one that is there is replaced, by two renames."""
    if not target.exists():
        new.rename(target)
        return
    old = new.with_suffix(".old")
    target.rename(old)
    try:
        new.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
