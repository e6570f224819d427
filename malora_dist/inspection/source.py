"""An adapter as it lies on the disk, whichever of the two forms it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from peft.utils import CONFIG_NAME
from torch import Tensor

from malora_dist.checkpoint.base import TRACKER_FILE
from malora_dist.checkpoint.convert import read_adapter_weights
from malora_dist.checkpoint.manifest import MANIFEST_FILE
from malora_dist.errors import CheckpointError
from malora_dist.files import foreign_reader, is_regular_file, read_file, resolved
from malora_dist.hf.keys import TensorKey
from malora_dist.hf.read import read_peft_adapter
from malora_dist.methods.base import Method
from malora_dist.methods.spec import AdapterSpec


@dataclass(frozen=True)
class Adapter:
    """A whole adapter, and where it comes from.

    Attributes:
        directory: the `iter_*` directory, or that of the PEFT adapter.
        tensors: shaped as :meth:`Method.shape`.
        iteration: None: a PEFT adapter does not tell.
        condition: whether its files are known to be what was written, as a sentence.
        notes: what is odd, and which newer checkpoints were passed over; a line each.
        run: the configuration of the run that trained it; empty: the adapter does not tell.
    """

    directory: Path
    form: str
    spec: AdapterSpec
    tensors: Mapping[TensorKey, Tensor]
    base_model_name_or_path: str
    base_fingerprint: str
    iteration: int | None
    condition: str
    notes: tuple[str, ...]
    run: Mapping[str, Any]

    @cached_property
    def method(self) -> Method:
        """The method's declaration with the adapter's settings."""
        return self.spec.declared

    @cached_property
    def num_layers(self) -> int:
        return 1 + max(layer for layer, _, _ in self.tensors)

    @cached_property
    def widths(self) -> dict[str, tuple[int, int]]:
        """{projection: (in_features, out_features)}, by the shapes of the tensors."""
        return {p: (self._width(p, "in"), self._width(p, "out")) for p in self.spec.projections}

    def _width(self, projection: str, axis: str) -> int:
        name, param = next((n, param) for n, param in self.method.parameters.items() if axis in param.axes)
        return self.tensors[0, projection, name].shape[param.axes.index(axis)]

    def parameters(self, layer: int, projection: str) -> dict[str, Tensor]:
        """The adapter of one projection."""
        return {name: self.tensors[layer, projection, name] for name in self.method.parameters}

    def per_site(self, *shape: int) -> np.ndarray:
        """An array of NaN with a place for every layer and projection. float64 [layers, projections, *shape]"""
        return np.full((self.num_layers, len(self.spec.projections), *shape), np.nan)


def read_adapter(path: Path) -> Adapter:
    """Read a run's newest sound checkpoint, one `iter_*` directory, or a PEFT adapter.

    Raises:
        CheckpointError: it is none of them, or damaged.
    """
    path = resolved(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: is not a directory; name the `save` of a run or a PEFT adapter")
    if is_regular_file(path / CONFIG_NAME):
        return _read_peft(path)
    if not (path / TRACKER_FILE).exists() and not path.name.startswith("iter_") and not any(path.glob("iter_*")):
        raise CheckpointError(
            f"{path}: holds neither a run's checkpoints (no {TRACKER_FILE}) nor a PEFT adapter (no {CONFIG_NAME}); "
            "name the `save` of a run or a PEFT adapter"
        )
    return _read_checkpoint(path)


def _read_peft(path: Path) -> Adapter:
    peft = read_peft_adapter(path)
    return Adapter(
        directory=path,
        form="PEFT adapter",
        spec=peft.spec,
        tensors=peft.tensors,
        base_model_name_or_path=peft.base_model_name_or_path,
        base_fingerprint=peft.base_fingerprint,
        iteration=None,
        condition="all tensors are there; a PEFT adapter has no manifest to compare its content with",
        notes=(),
        run={},
    )


def _read_checkpoint(path: Path) -> Adapter:
    notes: list[str] = []
    found = read_adapter_weights(path, notes.append)
    is_verified = (found.directory / MANIFEST_FILE).is_file()  # reading has compared it
    return Adapter(
        directory=found.directory,
        form="megatron checkpoint",
        spec=found.spec,
        tensors=found.tensors,
        base_model_name_or_path=found.base_model_name_or_path,
        base_fingerprint=found.base_fingerprint,
        iteration=found.iteration,
        condition="verified: every file is the one in its manifest" if is_verified else "not verifiable: no manifest",
        notes=tuple(notes),
        run=_read_run(found.directory / "config.yaml"),
    )


def _read_run(file: Path) -> Mapping[str, Any]:
    """The resolved configuration of a run; an import has none."""
    if not is_regular_file(file):
        return {}
    content = read_file(file, CheckpointError, "copy the checkpoint again")
    with foreign_reader(file, "copy the checkpoint again", "is not YAML"):
        raw = yaml.safe_load(content)
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file}: is not a configuration; copy the checkpoint again")
    return raw
