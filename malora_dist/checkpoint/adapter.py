"""Adapter checkpoints: adapter, optimizer and data position as one megatron dist checkpoint.

    SAVE/
        latest_checkpointed_iteration.txt   written last: a checkpoint without it is not there
        iter_0000100/                       megatron-core `torch_dist` checkpoint
            adapter.json                    :class:`AdapterInfo`
            config.yaml                     the resolved configuration of the run

The frozen base is not in it; its fingerprint is. Dropout draws from (seed, step), so that no RNG
state has to be kept: the iteration is enough.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from malora_dist.checkpoint.base import TRACKER_FILE, BaseInfo, checkpoint_dir, iteration_name
from malora_dist.checkpoint.tensor_files import TorchDistReader
from malora_dist.config import Config
from malora_dist.config_file import save_config
from malora_dist.errors import CheckpointError, ConfigError
from malora_dist.layers.adapted_linear import is_adapter_key
from malora_dist.layers.decoder import CausalModel
from malora_dist.methods.spec import AdapterSpec, refuse_former_malora
from malora_dist.parallel.compatibility import check_common_state
from malora_dist.parallel.device import without_expected_warnings
from malora_dist.parallel.topology import Topology

ADAPTER_FILE = "adapter.json"
FORMAT_VERSION = 2


@dataclass(frozen=True)
class AdapterInfo:
    """What `adapter.json` says about a checkpoint."""

    spec: AdapterSpec
    base_fingerprint: str
    base_name_or_path: str
    iteration: int
    num_layers: int
    has_optimizer: bool = True  # False: imported weights, from which a run starts anew


@dataclass
class Trained:
    """What a checkpoint holds and restores; progress counts optimizer steps and samples.

    The model is this rank's chunks: one, or one per virtual pipeline stage.
    """

    model: Sequence[CausalModel]
    optimizer: MegatronOptimizer
    iteration: int = 0
    consumed_samples: int = 0


def find_start(config: Config) -> Path | None:
    """The checkpoint that a run begins from: with ``resume: auto`` that in `save`, else that in `load`, if any.

    Raises:
        CheckpointError: `load` holds none.
    """
    if config.resume == "auto" and config.save and (Path(config.save) / TRACKER_FILE).is_file():
        return checkpoint_dir(Path(config.save))
    return checkpoint_dir(Path(config.load)) if config.load else None


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
        elif version != FORMAT_VERSION:
            raise CheckpointError(
                f"{file}: format_version={version!r}, this version reads 1 and {FORMAT_VERSION}; "
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
        )
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from error
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
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
    }
    (directory / ADAPTER_FILE).write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def check_adapter_matches(directory: Path, spec: AdapterSpec, base: BaseInfo) -> None:
    """Refuse a checkpoint of another base or another adapter, or a half-written one.

    Raises:
        CheckpointError: naming what differs and both values, or the file that is missing or cut off.
    """
    info = read_adapter_info(directory)
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
    if not (directory / "metadata.json").is_file():
        raise CheckpointError(f"{directory}: is half-written, metadata.json is missing; write or copy it again")
    check_common_state(directory, TorchDistReader(directory).objects)  # the reader checks the data files


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


def _sharded_state(trained: Trained, topology: Topology, is_loading: bool) -> dict[str, Any]:
    metadata = {"dp_cp_group": topology.dp_group, "distrib_optim_sharding_type": "fully_reshardable"}
    adapters = _sharded_model(trained.model, topology, adapters=True)
    return {
        "model": adapters,
        "optimizer": trained.optimizer.sharded_state_dict(adapters, is_loading=is_loading, metadata=metadata),
        "progress": {"iteration": trained.iteration, "consumed_samples": trained.consumed_samples},
    }


def save_adapter_checkpoint(
    save: Path, trained: Trained, config: Config, base: BaseInfo, num_layers: int, topology: Topology
) -> Path:
    """Write `iter_*` and, when every rank is done, the tracker file. Called by all ranks."""
    directory = save / iteration_name(trained.iteration)
    if topology.rank == 0:
        directory.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    with without_expected_warnings():
        dist_checkpointing.save(_sharded_state(trained, topology, is_loading=False), str(directory), strategy)
    if topology.rank == 0:
        spec = AdapterSpec(**config.adapter_fields())
        origin = base.fingerprint, base.hf_model_name_or_path
        write_adapter_info(directory, AdapterInfo(spec, *origin, trained.iteration, num_layers))
        save_config(config, directory / "config.yaml")
        (save / TRACKER_FILE).write_text(f"{trained.iteration}\n", encoding="utf-8")
    dist.barrier()
    return directory


def load_adapter_checkpoint(directory: Path, trained: Trained, topology: Topology) -> None:
    """Restore everything of :class:`Trained` in place from one `iter_*` directory.

    Call :func:`check_adapter_matches` first. Missing and unexpected keys are errors.

    Raises:
        CheckpointError: half-written, or keys or shapes that do not fit.
    """
    has_optimizer = read_adapter_info(directory).has_optimizer
    if has_optimizer:
        state = _sharded_state(trained, topology, is_loading=True)
    else:
        state = {"model": _sharded_model(trained.model, topology, adapters=True)}
    cure = "resume with the config.yaml in it" if has_optimizer else "import the adapter again, for this base"
    loaded = _load_sharded(state, directory, StrictHandling.RAISE_ALL, cure)
    for number, chunk in enumerate(trained.model):
        chunk.load_state_dict(loaded["model"][f"chunk {number}"], strict=False)
    if has_optimizer:
        trained.optimizer.load_state_dict(loaded["optimizer"])
        trained.iteration = loaded["progress"]["iteration"]
        trained.consumed_samples = loaded["progress"]["consumed_samples"]


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
