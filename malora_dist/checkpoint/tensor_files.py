"""Tensors on disk, read and written one at a time: safetensors and torch's distributed checkpoints.

No process group is needed: torch's checkpoint reader and writer are driven through their own
interface, without its ``save`` and ``load``, which want the whole state dict in memory.
"""

from __future__ import annotations

import hashlib
import io
import math
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint import (
    ChunkStorageMetadata,
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
    LoadPlan,
    SavePlan,
    TensorStorageMetadata,
    WriteItem,
)
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from malora_dist.errors import CheckpointError
from malora_dist.files import foreign_reader, is_regular_file
from malora_dist.pretrained import weight_map


class HfWeights:
    """The tensors of a Hugging Face model directory; only what is asked for is read.

    Attributes:
        shapes, dtypes: of every tensor in the files, by key.

    Raises:
        CheckpointError: no safetensors files, or the index and the files do not agree.
    """

    def __init__(self, directory: Path) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._files: dict[str, Path] = {}
        listed = weight_map(directory)
        for file in sorted(set(listed.values()) or {directory / "model.safetensors"}):
            self._read_header(file)
        for key, file in listed.items():
            if self._files.get(key) != file:
                raise CheckpointError(
                    f"{file}: has no tensor {key!r}, which the index places there; copy the model again"
                )

    def _read_header(self, file: Path) -> None:
        if not is_regular_file(file):
            raise CheckpointError(f"{file}: is missing, but the index names it; complete the model")
        with self._opened(file) as opened:
            for key in opened.keys():  # noqa: SIM118 (not a mapping)
                if key in self._files:
                    other = self._files[key].name
                    raise CheckpointError(f"{file}: tensor {key!r} is also in {other}; copy the model again")
                view = opened.get_slice(key)
                self._files[key] = file
                self.shapes[key] = tuple(view.get_shape())
                self.dtypes[key] = view[0:0].dtype if view.get_shape() else opened.get_tensor(key).dtype

    @staticmethod
    @contextmanager
    def _opened(file: Path) -> Iterator[Any]:
        with (
            foreign_reader(file, "copy it again", "is not a whole safetensors file"),
            safe_open(file, framework="pt") as opened,
        ):
            yield opened

    def read(self, key: str) -> Tensor:
        """One tensor, on the CPU."""
        with self._opened(self._files[key]) as opened:
            tensor: Tensor = opened.get_tensor(key)
            return tensor


class Fingerprint:
    """Identity of a model: SHA-256 over (key, shape, dtype, SHA-256 of the bytes) of its tensors, sorted by key.

    Tensors may come in any order, so that it can be computed while a model streams by.
    """

    def __init__(self) -> None:
        self._lines: dict[str, str] = {}

    def add(self, key: str, tensor: Tensor) -> None:
        """Take one tensor into account, by its bits."""
        content = hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().data).hexdigest()
        self._lines[key] = f"{key} {list(tensor.shape)} {tensor.dtype} {content}\n"

    def hexdigest(self) -> str:
        """The fingerprint of all tensors so far."""
        return hashlib.sha256("".join(self._lines[key] for key in sorted(self._lines)).encode()).hexdigest()


def bits_equal(a: Tensor, b: Tensor) -> bool:
    """Same dtype, shape and bits; NaN equals itself."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@dataclass(frozen=True)
class TensorChunk:
    """A block of a tensor in a checkpoint, and where its values come from."""

    key: str
    dtype: torch.dtype
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    load: Callable[[], Tensor]  # gives a CPU tensor of `shape` and `dtype`


class _LazyPlanner(DefaultSavePlanner):
    """Fetches a tensor only when the writer has come to it."""

    def __init__(self, chunks: Iterable[TensorChunk]) -> None:
        super().__init__()
        self._chunks = {(chunk.key, torch.Size(chunk.offset)): chunk for chunk in chunks}

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        index = write_item.index
        if write_item.type == WriteItemType.BYTE_IO:
            empty = io.BytesIO()
            torch.save([None], empty)  # megatron's form: a list with one entry per local shard
            return empty
        assert index.offset is not None
        return self._chunks[index.fqn, index.offset].load()


def write_torch_dist(
    directory: Path,
    chunks: Sequence[TensorChunk],
    empty_objects: Sequence[str] = (),
    progress: Callable[[Sequence[SavePlan]], Iterable[SavePlan]] = iter,
) -> None:
    """Write a torch distributed checkpoint, one data file per chunk: torch keeps what it writes until a file is done.

    To torch each chunk looks like the share of one rank.

    Args:
        directory: an empty directory.
        empty_objects: keys of objects whose value is None.
    """
    writer = FileSystemWriter(directory, thread_count=1)
    writer.set_up_storage_writer(True)
    plans = [SavePlan([_write_item(chunk)]) for chunk in chunks]
    if empty_objects:
        plans.append(SavePlan([WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in empty_objects]))
    plans, metadata = create_default_global_save_plan([writer.prepare_local_plan(plan) for plan in plans])
    plans = writer.prepare_global_plan(plans)
    planner = _LazyPlanner(chunks)
    writer.finish(metadata, [writer.write_data(plan, planner).wait() for plan in progress(plans)])


def _write_item(chunk: TensorChunk) -> WriteItem:
    return WriteItem(
        index=MetadataIndex(chunk.key, chunk.offset),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(torch.Size(chunk.offset), torch.Size(chunk.shape)),
            properties=TensorProperties(dtype=chunk.dtype),
            size=torch.Size(chunk.global_shape),
        ),
    )


class _ChunkLoader(DefaultLoadPlanner):
    """Copies what is read into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._target


class TorchDistReader:
    """The tensors of a torch distributed checkpoint, whatever layout wrote it.

    Attributes:
        tensors: {key: metadata with `size` (global shape) and `properties.dtype`}.
        objects: keys of what is not a tensor.

    Raises:
        CheckpointError: the checkpoint is half-written: a file is missing or too short.
    """

    def __init__(self, directory: Path) -> None:
        self._reader = FileSystemReader(directory)
        self._directory = directory
        metadata = self._read_metadata()
        self.tensors = {k: v for k, v in metadata.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}
        self.objects = metadata.state_dict_metadata.keys() - self.tensors.keys()
        self._reader.set_up_storage_reader(metadata, True)

    def _read_metadata(self) -> Metadata:
        file = self._directory / ".metadata"
        if not file.is_file():
            raise CheckpointError(f"{self._directory}: is half-written, .metadata is missing; write or copy it again")
        try:
            metadata = self._reader.read_metadata()
        except (EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{file}: is cut off or damaged ({error}); write or copy it again") from error
        sizes: dict[str, int] = {}
        for stored in (metadata.storage_data or {}).values():
            sizes[stored.relative_path] = max(sizes.get(stored.relative_path, 0), stored.offset + stored.length)
        for name, size in sorted(sizes.items()):
            data = self._directory / name
            if not data.is_file():
                raise CheckpointError(f"{self._directory}: is half-written, {name} is missing; write or copy it again")
            if data.stat().st_size < size:
                raise CheckpointError(
                    f"{data}: is half-written, has {data.stat().st_size} of {size} bytes; write or copy it again"
                )
        return metadata

    def read(self, key: str, offset: Sequence[int] | None = None, shape: Sequence[int] | None = None) -> Tensor:
        """A block of a tensor, by default the whole; on the CPU, dtype and bits kept.

        Raises:
            CheckpointError: if the stored blocks do not cover it.
        """
        stored = self.tensors[key]
        block = ChunkStorageMetadata(
            torch.Size(offset if offset is not None else [0] * len(stored.size)), torch.Size(shape or stored.size)
        )
        target = torch.empty(block.sizes, dtype=stored.properties.dtype)
        items = create_read_items_for_chunk_list(key, stored, [block])
        # The blocks of one tensor never overlap, so equal sizes mean that nothing is left unset.
        if sum(math.prod(item.lengths) for item in items) != target.numel():
            raise CheckpointError(f"{self._directory}: tensor {key!r} is stored only in part; write it again")
        self._reader.read_data(LoadPlan(items), _ChunkLoader(target)).wait()
        return target
