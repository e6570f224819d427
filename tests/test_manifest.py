"""Manifests and pickles: every damaged byte is found, and nothing in a checkpoint is run."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from malora_dist.checkpoint.manifest import MANIFEST_FILE, check_inside, verify, write_manifest, write_text_durably
from malora_dist.checkpoint.pickles import check_object, read_metadata
from malora_dist.checkpoint.torch_dist import TensorChunk, TorchDistReader, write_megatron_files, write_torch_dist
from malora_dist.errors import CheckpointError


def write_checkpoint(directory: Path) -> Path:
    """A small but whole torch distributed checkpoint with a manifest."""
    values = torch.arange(6.0).reshape(2, 3)
    write_torch_dist(
        directory, [TensorChunk("weight", values.dtype, (2, 3), (0, 0), (2, 3), lambda: values)], ["extra"]
    )
    write_megatron_files(directory, {"progress": {"iteration": 3}})
    write_manifest(directory)
    return directory


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("manifest") / "checkpoint")


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    """In every position of every file, the manifest included; each error names the file."""
    directory = write_checkpoint(tmp_path / "checkpoint")
    for file in sorted(directory.iterdir()):
        content = file.read_bytes()
        for position in range(len(content)):
            damaged = bytearray(content)
            damaged[position] ^= 1 << position % 8
            file.write_bytes(damaged)
            with pytest.raises(CheckpointError) as caught:
                verify(directory)
            assert file.name in str(caught.value), (file, position)
        file.write_bytes(content)
    verify(directory)


@pytest.mark.parametrize("keep", [0, 1, 0.5, -1])
def test_a_cut_off_file_is_named(tmp_path: Path, keep: float) -> None:
    directory = write_checkpoint(tmp_path / "checkpoint")
    for file in sorted(directory.iterdir()):
        content = file.read_bytes()
        file.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
        with pytest.raises(CheckpointError, match=file.name):
            verify(directory)
        file.unlink()
        with pytest.raises(CheckpointError, match=file.name):
            verify(directory)
        file.write_bytes(content)


def test_ranks_share_the_work(sound: Path) -> None:
    """Each file is read by one of them."""
    damaged = sound / "common.pt"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    found = []
    for part in range(4):
        try:
            verify(sound, part, 4)
        except CheckpointError as error:
            found.append(str(error))
    damaged.write_bytes(content)
    assert len(found) == 1
    assert "common.pt" in found[0]


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", ""])
def test_a_manifest_does_not_lead_out_of_its_directory(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="outside of itself"):
        check_inside(tmp_path, name)


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.file}",)


def test_a_crafted_metadata_is_refused(sound: Path, tmp_path: Path) -> None:
    """Alone, and hidden in an otherwise valid one."""
    metadata = read_metadata(sound / ".metadata")
    for crafted in (Payload(tmp_path / "ran"), metadata):
        metadata.planner_data = Payload(tmp_path / "ran")
        (tmp_path / ".metadata").write_bytes(pickle.dumps(crafted))
        with pytest.raises(CheckpointError, match=r"would run posix.system"):
            read_metadata(tmp_path / ".metadata")
        with pytest.raises(CheckpointError, match="do not use this checkpoint"):
            TorchDistReader(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_crafted_object_is_refused(tmp_path: Path, legacy: bool) -> None:
    stream = io.BytesIO()
    torch.save({"a": Payload(tmp_path / "ran")}, stream, _use_new_zipfile_serialization=not legacy)
    stream.seek(0)
    with pytest.raises(CheckpointError, match="more than tensors and plain values; do not use"):
        check_object(stream, "common.pt")
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_whose_objects_would_run_something_is_refused(tmp_path: Path) -> None:
    """As megatron-core 0.19 keeps its common state; torch reads such objects with an unrestricted unpickler."""
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    from malora_dist.checkpoint.torch_dist import write_metadata, write_share

    write_metadata(directory, [write_share(directory, 0, [], {"common_state": Payload(tmp_path / "ran")})])
    with pytest.raises(CheckpointError, match=r"__0_0.distcp, 'common_state': holds more than tensors"):
        TorchDistReader(directory)
    assert not (tmp_path / "ran").exists()


def test_data_files_outside_are_refused(sound: Path, tmp_path: Path) -> None:
    metadata = read_metadata(sound / ".metadata")
    for index, stored in metadata.storage_data.items():
        metadata.storage_data[index] = type(stored)("../" + stored.relative_path, stored.offset, stored.length)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="outside of itself"):
        TorchDistReader(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x80", b"\x80\x04N.", b"no pickle", pickle.dumps({"a": 1})])
def test_a_damaged_metadata_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata: is (cut off or )?damaged"):
        TorchDistReader(tmp_path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"no archive"])
def test_a_damaged_object_is_one_line(content: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"^common.pt: is cut off or damaged"):
        check_object(io.BytesIO(content), "common.pt")


def test_a_small_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    """Killed at any write, the old text or the new one is there; tried by a process that dies in between."""
    file = tmp_path / "latest.txt"
    write_text_durably(file, "1\n")
    program = (
        "import os, pathlib, malora_dist.checkpoint.manifest as m\n"
        "m.sync = lambda path: os._exit(1)\n"
        f"m.write_text_durably(pathlib.Path({str(file)!r}), '2')"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 1
    assert file.read_text() == "1\n"
    write_text_durably(file, "3\n")
    assert [entry.name for entry in tmp_path.iterdir()] == ["latest.txt"]
    assert file.read_text() == "3\n"


def test_the_manifest_says_what_is_there(sound: Path) -> None:
    manifest = json.loads((sound / MANIFEST_FILE).read_text())
    assert manifest["files"].keys() == {entry.name for entry in sound.iterdir()} - {MANIFEST_FILE}
