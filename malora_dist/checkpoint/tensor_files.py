"""The tensors of a Hugging Face directory, read one at a time, and what identifies a model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from malora_dist.errors import CheckpointError


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
        listed = _weight_map(directory)
        for file in sorted({directory / name for name in listed.values()} or {directory / "model.safetensors"}):
            self._read_header(file)
        for key, name in listed.items():
            if self._files.get(key) != directory / name:
                raise CheckpointError(
                    f"{directory / name}: has no tensor {key!r}, which the index places there; copy the model again"
                )

    def _read_header(self, file: Path) -> None:
        if not file.is_file():
            raise CheckpointError(f"{file}: is missing, but the index names it; complete the model")
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 (not a mapping)
                    if key in self._files:
                        other = self._files[key].name
                        raise CheckpointError(f"{file}: tensor {key!r} is also in {other}; copy the model again")
                    view = opened.get_slice(key)
                    self._files[key] = file
                    self.shapes[key] = tuple(view.get_shape())
                    self.dtypes[key] = view[0:0].dtype if view.get_shape() else opened.get_tensor(key).dtype
        except SafetensorError as error:
            raise CheckpointError(f"{file}: is not a whole safetensors file ({error}); copy it again") from error

    def read(self, key: str) -> Tensor:
        """One tensor, on the CPU."""
        with safe_open(self._files[key], framework="pt") as opened:
            return opened.get_tensor(key)


def _weight_map(directory: Path) -> dict[str, str]:
    """{key: file name} of a sharded model's index; empty for a model in one file."""
    # As transformers: the single file goes first.
    if (directory / "model.safetensors").is_file():
        return {}
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{index}: is not an index of safetensors files; copy it again") from error
    if any(directory.glob("*.bin")):
        raise CheckpointError(
            f"{directory}: holds its weights as .bin files, must be safetensors; save it again with "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
        )
    raise CheckpointError(f"{directory}: has no model.safetensors and no {index.name}; download the weights")


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
