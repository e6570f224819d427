"""The tensors of a Hugging Face directory, read one at a time, and what identifies a model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

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
