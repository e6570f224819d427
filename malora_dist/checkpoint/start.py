"""What a run starts from: the newest sound checkpoint, and whether it goes on with what it was trained on."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from malora_dist.checkpoint import run_directory
from malora_dist.checkpoint.adapter import AdapterInfo, check_whole
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


def newest_sound(path: Path, agree: Callable[[str], str] = str, part: int = 0, parts: int = 1) -> Start:
    """The newest sound checkpoint of a `save` directory, or the one named itself.

    Args:
        agree: makes a fault that one of several callers has found one of all.
        part, parts: see :func:`check_whole`.

    Raises:
        CheckpointError: there is none; with the fault of the newest.
    """
    directories, notes = run_directory.candidates(path)
    return _first_sound(directories, notes, agree, part, parts)


def find_start(config: Config, topology: Topology) -> Start | None:
    """The checkpoint that a run begins from: with ``resume: auto`` the newest in `save`, else in `load`, if any.

    Every machine verifies what it reads, its ranks a part each. Called by all ranks.

    Raises:
        CheckpointError: there are checkpoints, but none is sound.
    """
    path = config.load
    if config.resume == "auto" and config.save:
        has_begun = [bool(run_directory.iterations(Path(config.save)))]
        dist.broadcast_object_list(has_begun)  # of the first rank: others may not see yet what it has just written
        if has_begun[0]:
            path = config.save
    if not path:
        return None
    listed: list = [[], [], ""]
    if topology.rank == 0:
        try:
            listed = [*run_directory.candidates(Path(path)), ""]
        except CheckpointError as error:
            listed[2] = str(error)
    dist.broadcast_object_list(listed)
    directories, notes, fault = listed
    if fault:
        raise CheckpointError(fault)
    return _first_sound(directories, notes, first_fault, *place_on_machine())


def _first_sound(
    directories: Sequence[Path], notes: Sequence[str], agree: Callable[[str], str], part: int, parts: int
) -> Start:
    faults: list[str] = []
    for directory in directories:
        info = None
        try:
            info = check_whole(directory, part, parts)
            fault = agree("")
        except CheckpointError as error:
            fault = agree(str(error))
        if not fault and info is not None:
            passed = [f"passed over: {fault}" for fault in faults]
            if info.format_version < 3:
                passed.append(f"{directory}: an earlier version wrote it, so its content cannot be verified")
            return Start(directory, info, [*notes, *passed])
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
        self.note, self._fault = "", ""
        self._thread = threading.Thread(target=self._verify_weights, args=(path,), name="verify", daemon=True)
        if not has_manifest(path):
            self.note = f"{path}: an earlier version converted it, so its content cannot be verified; import it again"
            return
        _raise_on_all(_fault_of(path, 0, 1, range(_LARGE)))
        self._thread.start()

    def finish(self) -> None:
        """Wait for the weights.

        Raises:
            CheckpointError: as above.
        """
        if not self.note:
            self._thread.join()
            _raise_on_all(self._fault)

    def _verify_weights(self, path: Path) -> None:
        self._fault = _fault_of(path, *place_on_machine(), range(_LARGE, sys.maxsize))


def _fault_of(path: Path, part: int, parts: int, sizes: range) -> str:
    try:
        verify(path, part, parts, sizes)
    except CheckpointError as error:
        return str(error)
    return ""


def _raise_on_all(fault: str) -> None:
    fault = first_fault(fault)
    if fault:
        raise CheckpointError(fault)
