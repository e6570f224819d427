"""What a run starts from: the newest sound checkpoint, and whether it goes on with what it was trained on."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from malora_dist.checkpoint import run_directory
from malora_dist.checkpoint.adapter import AdapterInfo, check_content, check_structure
from malora_dist.checkpoint.base import has_manifest
from malora_dist.checkpoint.manifest import verify
from malora_dist.config import Config
from malora_dist.errors import CheckpointError
from malora_dist.parallel.collectives import first_fault
from malora_dist.parallel.topology import Topology, place_on_machine

#: Bytes from which on reading a file takes time.
_LARGE = 1 << 20


class Start(NamedTuple):
    """A sound checkpoint.

    Attributes:
        notes: what is odd, and which newer checkpoints were passed over and why; a line each.
    """

    directory: Path
    info: AdapterInfo
    notes: list[str]


def newest_sound(path: Path) -> Start:
    """The newest sound checkpoint of a `save` directory, or the one named itself; in one process.

    Raises:
        CheckpointError: there is none; with the fault of the newest.
    """
    directories, notes = run_directory.candidates(path)
    return _first_sound(directories, notes, str, 0, 1)


def find_start(config: Config, topology: Topology) -> Start | None:
    """The checkpoint that a run begins from: with ``resume: auto`` the newest in `save`, else in `load`, if any.

    Every machine verifies what it reads, its ranks a part each. Called by all ranks.

    Raises:
        CheckpointError: there are checkpoints, but none is sound.
    """
    listed: list[Any] = [[], [], ""]
    if topology.rank == 0:  # others may not see yet what it has just written
        listed[2] = _fault_of(lambda: listed.__setitem__(slice(2), _listed(config)))
    dist.broadcast_object_list(listed)
    directories, notes, fault = listed
    if fault:
        raise CheckpointError(fault)
    if not directories:
        return None
    return _first_sound(directories, notes, first_fault, *place_on_machine())


def _listed(config: Config) -> tuple[list[Path], list[str]]:
    """The checkpoints that a run may begin from, and what is odd; none: it starts anew."""
    save, load = Path(config.save), Path(config.load)
    if config.resume == "auto" and config.save and run_directory.iterations(save):
        directories, notes = run_directory.candidates(save)
        unused = [f"load={config.load!r}" if config.load and load.resolve() != save.resolve() else ""]
        unused += ["overwrite=true" if config.overwrite else ""]
        notes += [f"{text} has no effect: resume=auto goes on from {save}" for text in unused if text]
        return directories, notes
    return run_directory.candidates(load) if config.load else ([], [])


def _first_sound(
    directories: Sequence[Path], notes: Sequence[str], agree: Callable[[str], str], part: int, parts: int
) -> Start:
    """The first sound one.

    Args:
        agree: makes a fault that one of several callers has found one of all.
        part, parts: see :func:`check_content`.
    """
    faults: list[str] = []
    for directory in directories:
        found: list[AdapterInfo] = []
        fault = agree(_fault_of(partial(check_content, directory, part, parts)))
        # Parsed only after that: what one would read wrong, another has found damaged.
        fault = fault or agree(_fault_of(lambda: found.append(check_structure(directory))))  # noqa: B023 (called here)
        if not fault:
            passed = [f"passed over: {fault}" for fault in faults]
            if found[0].format_version < 3:
                passed.append(f"{directory}: an earlier version wrote it, so its content cannot be verified")
            return Start(directory, found[0], [*notes, *passed])
        faults.append(fault)
    rest = f" (and {len(faults) - 1} older ones are damaged too)" if len(faults) > 1 else ""
    raise CheckpointError(faults[0] + rest)


class BaseVerification:
    """Verifies a converted base on every machine, its ranks a part of the large files each. Used by all ranks.

    Small files are verified at once, the weights in a thread, while the run reads its data and builds its model.

    Attributes:
        note: what cannot be verified; empty: nothing.

    Raises:
        CheckpointError: naming the file that is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self._fault = ""
        self._thread = threading.Thread(target=self._verify_weights, args=(path,), name="verify", daemon=True)
        can_verify = has_manifest(path)  # copies of several machines may differ
        _raise_on_all(_fault_of(partial(verify, path, sizes=range(_LARGE))) if can_verify else "")
        text = f"{path}: an earlier version converted it, so its content cannot be verified; import the model again"
        self.note = first_fault("" if can_verify or not path.is_dir() else text)
        if can_verify:
            self._thread.start()

    def finish(self) -> None:
        """Wait for the weights.

        Raises:
            CheckpointError: as above.
        """
        if self._thread.ident:
            self._thread.join()
        _raise_on_all(self._fault)

    def _verify_weights(self, path: Path) -> None:
        self._fault = _fault_of(partial(verify, path, *place_on_machine(), sizes=range(_LARGE, sys.maxsize)))


def _fault_of(check: Callable[[], object]) -> str:
    """What a check says; empty: nothing."""
    try:
        check()
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename}: cannot be read ({error.strerror}); check its permissions and its disk"
    return ""


def _raise_on_all(fault: str) -> None:
    fault = first_fault(fault)
    if fault:
        raise CheckpointError(fault)
