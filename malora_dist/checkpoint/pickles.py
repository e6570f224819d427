"""The pickles inside a checkpoint, read so that a crafted one cannot run anything.

A torch distributed checkpoint has two kinds: `.metadata`, which torch reads with an unrestricted unpickler, and objects
that ``torch.save`` wrote. Both are read here first, with what they may name restricted; after that, what torch and
megatron do with the same bytes is harmless.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.metadata import Metadata

from malora_dist.errors import CheckpointError, first_line

#: {module: names} that a `.metadata` may refer to, besides torch's dtypes.
_ALLOWED = {
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
}
_UNSAFE = "do not use this checkpoint unless you know who wrote it"
_DAMAGED = "write or copy it again"


class _RefusedError(Exception):
    """A pickle names what it may not."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise _RefusedError(f"{module}.{name}")


def read_metadata(file: Path) -> Metadata:
    """A checkpoint's `.metadata`.

    Raises:
        CheckpointError: cut off, damaged, or naming anything that does not belong into it; that is not run.
    """
    content = file.read_bytes()
    try:
        metadata = _MetadataUnpickler(io.BytesIO(content)).load()
    except _RefusedError as refused:
        raise CheckpointError(f"{file}: would run {refused}, which no checkpoint needs; {_UNSAFE}") from None
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to spell
        raise CheckpointError(f"{file}: is cut off or damaged ({error!r}); {_DAMAGED}") from error
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{file}: is damaged, it holds no checkpoint's metadata; {_DAMAGED}")
    return metadata


def check_object(source: Path | BinaryIO, name: str) -> None:
    """Read what ``torch.save`` wrote, tensors and plain values only, and forget it.

    Args:
        name: what an error calls it.

    Raises:
        CheckpointError: cut off, damaged, or holding more than that; nothing of it is run.
    """
    try:
        torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error):
            raise CheckpointError(f"{name}: holds more than tensors and plain values; {_UNSAFE}") from error
        raise CheckpointError(f"{name}: is cut off or damaged ({first_line(error)}); {_DAMAGED}") from error
    except Exception as error:  # as above, and torch's own RuntimeError of a broken archive
        raise CheckpointError(f"{name}: is cut off or damaged ({first_line(error)}); {_DAMAGED}") from error
