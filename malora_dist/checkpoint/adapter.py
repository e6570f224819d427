"""Adapter checkpoints: adapter, optimizer and data position as one megatron dist checkpoint.

    SAVE/
        latest_checkpointed_iteration.txt
        iter_0000100/                       megatron-core `torch_dist` checkpoint
            adapter.json                    :class:`AdapterInfo`
            config.yaml                     the resolved configuration of the run
            manifest.json                   size and SHA-256 of every other file

The frozen base is not in it; its fingerprint is. Dropout draws from (seed, step), so that no RNG
state has to be kept: the iteration is enough.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from malora_dist.checkpoint.base import BaseInfo
from malora_dist.checkpoint.manifest import MANIFEST_FILE, read_manifest, verify
from malora_dist.checkpoint.pickles import check_object
from malora_dist.checkpoint.torch_dist import TorchDistReader
from malora_dist.config import Config
from malora_dist.errors import CheckpointError, ConfigError
from malora_dist.files import read_json_object
from malora_dist.layers.adapted_linear import is_adapter_key
from malora_dist.layers.decoder import CausalModel
from malora_dist.methods.spec import AdapterSpec, refuse_former_malora
from malora_dist.parallel.compatibility import check_common_state
from malora_dist.parallel.device import without_expected_warnings
from malora_dist.parallel.topology import Topology

ADAPTER_FILE = "adapter.json"
FORMAT_VERSION = 3


@dataclass(frozen=True)
class AdapterInfo:
    """What `adapter.json` says about a checkpoint.

    Attributes:
        has_optimizer: False: imported weights, from which a run starts anew.
        data: {file of a task: its fingerprint} of the run.
        best: the best evaluation up to this iteration, see :class:`~malora_dist.training.best.Best`; empty: none.
    """

    spec: AdapterSpec
    base_fingerprint: str
    base_name_or_path: str
    iteration: int
    num_layers: int
    has_optimizer: bool = True
    data: Mapping[str, str] = field(default_factory=dict)
    best: Mapping[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


@dataclass
class Trained:
    """What a checkpoint holds and restores; progress counts optimizer steps and samples.

    The model is this rank's chunks: one, or one per virtual pipeline stage.
    """

    model: Sequence[CausalModel]
    optimizer: MegatronOptimizer
    iteration: int = 0
    consumed_samples: int = 0


def describe_run(config: Config, base: BaseInfo, num_layers: int, data: Mapping[str, str]) -> AdapterInfo:
    """What all checkpoints of a run say in `adapter.json`, before its first step."""
    spec = AdapterSpec(**config.adapter_fields())
    return AdapterInfo(spec, base.fingerprint, base.hf_model_name_or_path, 0, num_layers, data=data)


def read_adapter_info(directory: Path) -> AdapterInfo:
    """Read `adapter.json` of one `iter_*` directory.

    Raises:
        CheckpointError: it is missing, unreadable, of another format version, or of MALoRA in a former form.
    """
    file = directory / ADAPTER_FILE
    if not file.is_file():
        raise CheckpointError(
            f"{directory}: is not an adapter checkpoint or is half-written, {ADAPTER_FILE} is missing; "
            "name the `save` directory of a run, or copy it again"
        )
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        version, fields = raw["format_version"], raw["spec"]
        if version == 1:  # it had one field more
            refuse_former_malora(fields["method"], fields.pop("rank_expansion"))
        elif version not in (2, FORMAT_VERSION):
            raise CheckpointError(
                f"{file}: format_version={version!r}, this version reads 1 to {FORMAT_VERSION}; "
                "use the version that wrote it"
            )
        spec = AdapterSpec(**fields)
        spec.validate_adapter()
        return AdapterInfo(
            spec=spec,
            base_fingerprint=raw["base"]["fingerprint"],
            base_name_or_path=raw["base"]["hf_model_name_or_path"],
            iteration=raw["iteration"],
            num_layers=raw["num_layers"],
            has_optimizer=raw.get("has_optimizer", True),
            data={str(key): str(value) for key, value in raw.get("data", {}).items()},
            best=dict(raw.get("best", {})),
            format_version=version,
        )
    except CheckpointError:
        raise
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error!r}); copy the checkpoint again") from error


def write_adapter_info(directory: Path, info: AdapterInfo) -> None:
    """Write `adapter.json`, what :func:`read_adapter_info` reads."""
    raw = {
        "format_version": FORMAT_VERSION,
        "spec": info.spec.adapter_fields(),
        "base": {"fingerprint": info.base_fingerprint, "hf_model_name_or_path": info.base_name_or_path},
        "iteration": info.iteration,
        "num_layers": info.num_layers,
        "has_optimizer": info.has_optimizer,
        "data": dict(info.data),
        "best": dict(info.best),
    }
    (directory / ADAPTER_FILE).write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def check_whole(directory: Path, part: int = 0, parts: int = 1) -> AdapterInfo:
    """Check that one `iter_*` directory is complete and undamaged.

    Args:
        part, parts: of several callers, each compares the content of its share of the files with the manifest.
            Checkpoints of an earlier version have none; of them it is known only that nothing is missing.

    Raises:
        CheckpointError: naming the file that is missing, cut off or damaged, or that would run something.
    """
    check_content(directory, part, parts)
    return check_structure(directory)


def check_content(directory: Path, part: int = 0, parts: int = 1) -> None:
    """The first half of :func:`check_whole`, of which several callers do a part each."""
    if (directory / MANIFEST_FILE).is_file():
        verify(directory, part, parts)


def check_structure(directory: Path) -> AdapterInfo:
    """The other half: what it says of itself, and that nothing is missing or would run something."""
    try:
        info = read_adapter_info(directory)
        if info.format_version >= 3:
            read_manifest(directory)
        if not (directory / "metadata.json").is_file():
            raise CheckpointError(f"{directory}: is half-written, metadata.json is missing; write or copy it again")
        read_json_object(directory / "metadata.json", CheckpointError, "write or copy it again")
        check_common_state(directory, TorchDistReader(directory).objects)  # the reader checks the data files
        if (directory / "common.pt").is_file():
            check_object(directory / "common.pt", str(directory / "common.pt"))
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be read ({error}); check its permissions and its disk") from error
    return info


def check_adapter_matches(directory: Path, info: AdapterInfo, spec: AdapterSpec, base: BaseInfo) -> None:
    """Refuse a checkpoint of another base or another adapter.

    Raises:
        CheckpointError: naming what differs and both values.
    """
    if info.base_fingerprint != base.fingerprint:
        raise CheckpointError(
            f"{directory}: was trained on another base ({info.base_name_or_path}, fingerprint "
            f"{info.base_fingerprint[:12]}) than pretrained_checkpoint holds ({base.hf_model_name_or_path}, "
            f"fingerprint {base.fingerprint[:12]}); name that base"
        )
    identity = info.spec.identity()
    if not info.has_optimizer:
        del identity["freeze"]  # what else than the optimizer's state would depend on it
    for key, saved in identity.items():
        wanted = spec.identity().get(key)
        if saved != wanted:
            raise CheckpointError(
                f"{directory}: has {key}={saved!r}, the config says {wanted!r}; set it to the checkpoint's"
            )


def _sharded_model(model: Sequence[CausalModel], topology: Topology, adapters: bool) -> dict[str, dict[str, Any]]:
    """Of each chunk the sharded tensors of its adapters, or of its base: {"chunk 0": {key: tensor}, ...}.

    Chunks count their layers from 0, so that their own keys are the same; those of the sharded
    tensors, which are the checkpoint's, are not.
    """
    sharded = {}
    for number, chunk in enumerate(model):
        state = chunk.sharded_state_dict(metadata={"dp_cp_group": topology.dp_group})
        sharded[f"chunk {number}"] = {
            key: value
            for key, value in state.items()
            if is_adapter_key(key) == adapters and not key.endswith("_extra_state")
        }
    return sharded


def sharded_state(trained: Trained, topology: Topology, is_loading: bool) -> dict[str, Any]:
    """All of :class:`Trained` as megatron's sharded tensors, keys of the checkpoint included."""
    metadata = {"dp_cp_group": topology.dp_group, "distrib_optim_sharding_type": "fully_reshardable"}
    adapters = _sharded_model(trained.model, topology, adapters=True)
    return {
        "model": adapters,
        "optimizer": trained.optimizer.sharded_state_dict(adapters, is_loading=is_loading, metadata=metadata),
        "progress": {"iteration": trained.iteration, "consumed_samples": trained.consumed_samples},
    }


def load_adapter_checkpoint(directory: Path, has_optimizer: bool, trained: Trained, topology: Topology) -> None:
    """Restore everything of :class:`Trained` in place from one `iter_*` directory.

    Call :func:`check_whole` and :func:`check_adapter_matches` first. Missing and unexpected keys are errors.

    Raises:
        CheckpointError: half-written, or keys or shapes that do not fit.
    """
    if has_optimizer:
        state = sharded_state(trained, topology, is_loading=True)
    else:
        state = {"model": _sharded_model(trained.model, topology, adapters=True)}
    cure = "resume with the config.yaml in it" if has_optimizer else "import the adapter again, for this base"
    loaded = _load_sharded(state, directory, StrictHandling.RAISE_ALL, cure)
    for number, chunk in enumerate(trained.model):
        chunk.load_state_dict(loaded["model"][f"chunk {number}"], strict=False)
    if has_optimizer:
        _restore_step_0(loaded["optimizer"])
        trained.optimizer.load_state_dict(loaded["optimizer"])
        trained.iteration = loaded["progress"]["iteration"]
        trained.consumed_samples = loaded["progress"]["consumed_samples"]


def _restore_step_0(state: dict[Any, Any]) -> None:
    """Megatron's plain optimizers store the number of steps once for all parameters, but not a number of 0."""
    for part in [state] if "state" in state else state.values():  # of a chain they are numbered
        states = part.get("state", {}) if isinstance(part, dict) else {}
        moments = [state for state in states.values() if isinstance(state, dict) and "exp_avg" in state]
        if moments and "step" not in moments[0]:
            states.setdefault("common_step", torch.zeros(()))


def _load_sharded(state: dict[str, Any], directory: Path, strict: StrictHandling, cure: str) -> dict[str, Any]:
    """dist_checkpointing.load; a checkpoint that does not fit is a CheckpointError with this cure."""
    try:
        with without_expected_warnings():
            return dist_checkpointing.load(state, str(directory), strict=strict)
    except CheckpointingException as error:
        cause: BaseException = error
    except CheckpointException as error:  # torch's, with what each rank met
        cause, _ = next(iter(error.failures.values()))
    raise CheckpointError(f"{directory}: does not fit the model ({' '.join(str(cause).split())}); {cure}") from cause


def load_base_weights(directory: Path, model: Sequence[CausalModel], topology: Topology) -> None:
    """Fill the frozen base from a converted base's `iter_*` directory, on any TP x PP.

    Raises:
        CheckpointError: keys or shapes that do not fit the model.
    """
    base = _sharded_model(model, topology, adapters=False)
    loaded = _load_sharded(base, directory, StrictHandling.ASSUME_OK_UNEXPECTED, "convert the model again")
    for number, chunk in enumerate(model):
        result = chunk.load_state_dict(loaded[f"chunk {number}"], strict=False)
        missing = [key for key in result.missing_keys if not is_adapter_key(key) and not key.endswith("_extra_state")]
        if missing or result.unexpected_keys:
            raise CheckpointError(
                f"{directory}: missing keys {missing}, unexpected keys {result.unexpected_keys}; "
                "convert the model again"
            )
