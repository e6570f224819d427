"""Torch's distributed checkpoints on disk, as megatron's `torch_dist` reads them, one tensor at a time in memory.

No process group is needed: torch's writer and reader are driven through their own interface, without its ``save`` and
``load``, which want the whole state dict in memory. Nor is megatron's writer used, which starts two further processes a
rank: they outlive a rank that is killed.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    BytesStorageMetadata,
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
from torch.distributed.checkpoint.filesystem import _StoragePrefix
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from malora_dist.checkpoint.manifest import check_inside
from malora_dist.checkpoint.pickles import check_object, read_metadata
from malora_dist.errors import CheckpointError


@dataclass(frozen=True)
class TensorChunk:
    """A block of a tensor in a checkpoint, and where its values come from."""

    key: str
    dtype: torch.dtype
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    load: Callable[[], Tensor]  # gives a tensor of `shape` and `dtype`


class Share(NamedTuple):
    """What one rank has written: the entries, and where they lie."""

    plan: SavePlan
    results: list[WriteResult]


class _LazyPlanner(DefaultSavePlanner):
    """Fetches a tensor only when the writer has come to it."""

    def __init__(self, chunks: Iterable[TensorChunk], objects: Mapping[str, object]) -> None:
        super().__init__()
        self._chunks = {(chunk.key, torch.Size(chunk.offset)): chunk for chunk in chunks}
        self._objects = objects

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        index = write_item.index
        if write_item.type == WriteItemType.BYTE_IO:
            stream = io.BytesIO()
            torch.save([self._objects[index.fqn]], stream)  # megatron's form: a list with one entry per local shard
            return stream
        assert index.offset is not None
        return self._chunks[index.fqn, index.offset].load()


def write_share(
    directory: Path, rank: int, chunks: Sequence[TensorChunk], objects: Mapping[str, object] | None = None
) -> Share:
    """Write one rank's data file into a checkpoint, forced to the disk; no rank waits for another.

    Args:
        chunks: no other rank has the same.
        objects: {key: what is not a tensor}, with megatron's keys.
    """
    objects = objects or {}
    items = [_write_item(chunk) for chunk in chunks]
    items += [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in objects]
    # torch's writer names the file after the place of the plan among all plans, which are not together here.
    plan = SavePlan(items, storage_data=_StoragePrefix(f"__{rank}_"))
    if not items:
        return Share(plan, [])
    # Without copying ahead, for which torch would want a CUDA context of this thread's own.
    writer = FileSystemWriter(directory, thread_count=1, per_thread_copy_ahead=0)
    return Share(plan, writer.write_data(plan, _LazyPlanner(chunks, objects)).wait())


def write_metadata(directory: Path, shares: Sequence[Share]) -> None:
    """Finish a checkpoint by its `.metadata`, which knows where everything lies."""
    _, metadata = create_default_global_save_plan([share.plan for share in shares])
    writer = FileSystemWriter(directory)
    writer.set_up_storage_writer(True)
    writer.finish(metadata, [share.results for share in shares])


def write_megatron_files(directory: Path, common: Mapping[str, Any] | None = None) -> None:
    """What megatron's `torch_dist` wants beside the tensors; importing megatron for it would take seconds.

    Args:
        common: what is not sharded.
    """
    torch.save(dict(common or {}), directory / "common.pt")
    backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    backends |= {"common_backend": "torch", "common_backend_version": 1}
    (directory / "metadata.json").write_text(json.dumps(backends), encoding="utf-8")


def write_torch_dist(
    directory: Path,
    chunks: Sequence[TensorChunk],
    empty_objects: Sequence[str] = (),
    progress: Callable[[Sequence[TensorChunk]], Iterable[TensorChunk]] = iter,
) -> None:
    """Write a whole checkpoint in one process, a data file per chunk: torch keeps what it writes until a file is done.

    To torch each chunk looks like the share of one rank.

    Args:
        directory: new; it is made.
        empty_objects: keys of objects whose value is None.
    """
    directory.mkdir(parents=True)
    shares = [write_share(directory, rank, [chunk]) for rank, chunk in enumerate(progress(chunks))]
    shares.append(write_share(directory, len(chunks), [], dict.fromkeys(empty_objects)))
    write_metadata(directory, shares)


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
    """The tensors of a checkpoint, whatever layout wrote it.

    Attributes:
        tensors: {key: metadata with `size` (global shape) and `properties.dtype`}.
        objects: keys of what is not a tensor.

    Raises:
        CheckpointError: a file is missing, too short or damaged, or holds what would run.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        metadata = self._read_metadata()
        self.tensors = {k: v for k, v in metadata.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}
        self.objects = metadata.state_dict_metadata.keys() - self.tensors.keys()
        self._reader = FileSystemReader(directory)
        self._reader.set_up_storage_reader(metadata, True)

    def _read_metadata(self) -> Metadata:
        file = self._directory / ".metadata"
        if not file.is_file():
            raise CheckpointError(f"{self._directory}: is half-written, .metadata is missing; write or copy it again")
        metadata = read_metadata(file)
        try:
            self._check_files(metadata)
        except CheckpointError:
            raise
        except Exception as error:  # whatever a damaged pickle leaves where a value should be
            raise CheckpointError(f"{file}: is damaged ({error!r}); write or copy it again") from error
        return metadata

    def _check_files(self, metadata: Metadata) -> None:
        """The data files are there and long enough, and objects in them hold plain values."""
        sizes: dict[str, int] = {}
        for stored in metadata.storage_data.values():
            check_inside(self._directory, stored.relative_path)
            sizes[stored.relative_path] = max(sizes.get(stored.relative_path, 0), stored.offset + stored.length)
        for name, size in sorted(sizes.items()):
            data = self._directory / name
            if not data.is_file():
                raise CheckpointError(f"{self._directory}: is half-written, {name} is missing; write or copy it again")
            if data.stat().st_size < size:
                raise CheckpointError(
                    f"{data}: is half-written, has {data.stat().st_size} of {size} bytes; write or copy it again"
                )
        for index, stored in metadata.storage_data.items():
            if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata):
                data = self._directory / stored.relative_path
                with data.open("rb") as opened:
                    opened.seek(stored.offset)
                    check_object(io.BytesIO(opened.read(stored.length)), f"{data}, {index.fqn!r}")

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
