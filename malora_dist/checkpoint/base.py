"""A converted base on disk, and directories that appear only when they are complete.

DIR/
    latest_checkpointed_iteration.txt   0
    iter_0000000/                       megatron-core `torch_dist` checkpoint of the base
    hf/                                 config, tokenizer and generation config of the original
    malora_base.json                    :class:`BaseInfo`
    manifest.json                       size and SHA-256 of every other file
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from malora_dist.checkpoint.manifest import MANIFEST_FILE, sync
from malora_dist.checkpoint.torch_dist import TorchDistReader
from malora_dist.errors import CheckpointError
from malora_dist.files import check_replaceable, put_in_place, resolved

TRACKER_FILE = "latest_checkpointed_iteration.txt"
INFO_FILE = "malora_base.json"
HF_FOLDER = "hf"

#: Everything a converted base consists of; a directory with more in it is never overwritten.
BASE_LAYOUT = frozenset({TRACKER_FILE, INFO_FILE, HF_FOLDER, "iter_0000000"})

#: What travels with a model besides its weights.
HF_FILE_PATTERNS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.jinja",
    "chat_template*",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


@dataclass(frozen=True)
class BaseInfo:
    """What was converted.

    Attributes:
        fingerprint: identity of the weights, see :class:`~malora_dist.checkpoint.tensor_files.Fingerprint`.
        hf_model_name_or_path: the Hugging Face directory it came from.
        dtype: name of the dtype that most parameters have, e.g. ``bfloat16``.
        num_parameters: tied embeddings counted once.
    """

    fingerprint: str
    hf_model_name_or_path: str
    dtype: str
    num_parameters: int


def iteration_name(iteration: int) -> str:
    """Megatron's name of a checkpoint's directory."""
    return f"iter_{iteration:07d}"


def read_tracker(path: Path) -> int:
    """The iteration that the tracker file of a checkpoint names.

    Raises:
        CheckpointError: no such directory, or half-written: no tracker file, or one that names none.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: is not a directory; name a checkpoint's directory")
    tracker = path / TRACKER_FILE
    if not tracker.is_file():
        reason = "is half-written" if any(path.glob("iter_*")) else "is not a checkpoint"
        raise CheckpointError(f"{path}: {reason}, {TRACKER_FILE} is missing; write or copy it again")
    iteration = tracker.read_bytes().decode(errors="replace").strip()
    if not (iteration.isascii() and iteration.isdecimal() and len(iteration) < 10):
        raise CheckpointError(f"{tracker}: holds {iteration!r}, must be the number of an iteration; write it again")
    return int(iteration)


def checkpoint_dir(path: Path) -> Path:
    """The directory of the iteration that the tracker file of a converted base names.

    Raises:
        CheckpointError: as :func:`read_tracker`, or that iteration is not there.
    """
    path = Path(path)
    directory = path / iteration_name(read_tracker(path))
    if not directory.is_dir():
        raise CheckpointError(
            f"{path}: is half-written, {directory.name} named by {TRACKER_FILE} is missing; write or copy it again"
        )
    return directory


def hf_dir(path: Path) -> Path:
    """The original's config and tokenizer, kept beside the converted base."""
    return Path(path) / HF_FOLDER


def has_manifest(path: Path) -> bool:
    """Whether a converted base can be verified; those of an earlier version cannot."""
    return (path / MANIFEST_FILE).is_file()


def read_base_info(path: Path) -> BaseInfo:
    """Read what a converted base holds, and check that all its files are there.

    Raises:
        CheckpointError: no such directory, not a converted base, or half-written.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: is not a directory; make it with `python tools/convert_hf.py import`")
    file = path / INFO_FILE
    if not file.is_file():
        raise CheckpointError(
            f"{path}: is not a converted base, {INFO_FILE} is missing; "
            "make one with `python tools/convert_hf.py import`"
        )
    iteration_dir = checkpoint_dir(path)
    for needed in (hf_dir(path) / "config.json", iteration_dir / "metadata.json", iteration_dir / "common.pt"):
        if not needed.is_file():
            raise CheckpointError(
                f"{path}: is half-written, {needed.relative_to(path)} is missing; write or copy it again"
            )
    TorchDistReader(iteration_dir)  # checks the data files
    try:
        return BaseInfo(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); convert the model again") from error


def write_base_info(path: Path, info: BaseInfo) -> None:
    """Write `malora_base.json`."""
    (path / INFO_FILE).write_text(json.dumps(dataclasses.asdict(info), indent=2) + "\n", encoding="utf-8")


def copy_hf_files(source: Path, target: Path) -> None:
    """Copy config, tokenizer, generation config and licence, but no weights."""
    target.mkdir(exist_ok=True)
    for file in {file for pattern in HF_FILE_PATTERNS for file in source.glob(pattern) if file.is_file()}:
        shutil.copyfile(file, target / file.name)


@contextlib.contextmanager
def staged_directory(target: Path, layout: Collection[str] = (), also_part: bool = False) -> Iterator[Path]:
    """A new directory that takes the place of `target` when the block ends, and is removed if it raises.

    Args:
        layout: names that make up an earlier result, which may be replaced when all of them and
            nothing else is there.
        also_part: a part of them is an earlier result, too; such a result has no manifest.

    Raises:
        CheckpointError: `target` holds anything else, or is a place that is never replaced.
    """
    target = resolved(target)

    def check() -> None:
        check_replaceable(target, layout if also_part else _layout_of(target, layout), also_part)

    check()
    staging = target.with_name(f".{target.name}.{os.getpid()}.partial")
    staging.mkdir(parents=True)
    try:
        yield staging
        check()  # again, since that may have taken hours
        put_in_place(staging, target)
        sync(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _layout_of(target: Path, layout: Collection[str]) -> set[str]:
    """The layout with or without its manifest, which earlier versions did not write."""
    return {*layout, *([MANIFEST_FILE] if (target / MANIFEST_FILE).exists() else [])}
