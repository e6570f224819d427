"""Reading a PEFT adapter directory, the inverse of export.py: ours, or a LoRA that stock PEFT trained."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import Tensor

from malora_dist.errors import CheckpointError, ConfigError, shown
from malora_dist.files import foreign_reader, is_regular_file, read_json_object
from malora_dist.hf.config import MaloraPeftType
from malora_dist.hf.keys import METADATA_BASE, METADATA_METHOD, TensorKey, check_complete, saved_key
from malora_dist.methods.spec import PROJECTIONS, AdapterSpec, refuse_former_malora

#: {field of AdapterSpec: field of LoraConfig}; fields of either config that say nothing about the adapter's function
#: (rank_expansion: in files of a former form, where it matters for MALoRA only, which is refused).
_LORA_FIELDS = {name: name for name in ("lora_alpha", "use_rslora", "lora_dropout")} | {"lora_rank": "r"}
_NEUTRAL_FIELDS = {
    "auto_mapping", "base_fingerprint", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version",
    "rank_expansion", "revision", "seed", "task_type",
}  # fmt: skip
#: Starts of a LoRA that leave the base as it is. Others (PiSSA, OLoRA, ...) move a part of it into the adapter.
_LORA_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class PeftAdapter:
    """A PEFT adapter, complete and of known shapes.

    Attributes:
        tensors: shaped as :meth:`Method.shape`, float32 or the 16-bit dtype of the file.
        base_fingerprint: "" if the directory does not tell.
    """

    spec: AdapterSpec
    tensors: Mapping[TensorKey, Tensor]
    base_model_name_or_path: str
    base_fingerprint: str


def read_peft_adapter(directory: Path) -> PeftAdapter:
    """Read all of an adapter.

    Raises:
        CheckpointError: not a PEFT adapter, not a method of this project, a setting
            that the spec has no word for, or missing, unexpected or misshapen tensors (all listed).
    """
    raw = _read_config(directory)
    found, metadata = _read_tensors(directory)
    spec = _spec(directory, raw, metadata)
    numbers = [int(match[1]) for match in (re.search(r"\.layers\.(\d{1,9})\.", key) for key in found) if match]
    if max(numbers, default=0) >= max(len(found), 1):  # every layer has a tensor
        raise CheckpointError(f"{directory}: has {len(found)} tensors, one of layer {max(numbers)}; save it again")
    expected = {
        saved_key(spec, layer, projection, name): (layer, projection, name)
        for layer in range(max(numbers, default=0) + 1)
        for projection in spec.projections
        for name in spec.declared.parameters
    }
    unexpected = sorted(found.keys() - expected.keys())
    if unexpected:
        raise CheckpointError(
            f"{directory}: tensor {unexpected[0]!r} ({len(unexpected)} such) is not part of the adapter that "
            f"{CONFIG_NAME} describes; save the adapter again"
        )
    tensors = {expected[key]: tensor for key, tensor in found.items()}
    check_complete(str(directory), spec, tensors, "save the adapter again")
    return PeftAdapter(
        spec,
        tensors,
        base_model_name_or_path=str(raw.get("base_model_name_or_path") or ""),
        base_fingerprint=str(metadata.get(METADATA_BASE) or raw.get("base_fingerprint") or ""),
    )


def _read_config(directory: Path) -> dict[str, Any]:
    file = directory / CONFIG_NAME
    if not is_regular_file(file):
        raise CheckpointError(f"{directory}: has no {CONFIG_NAME}; name the directory of a PEFT adapter")
    return read_json_object(file, CheckpointError, "copy the file again")


def _read_tensors(directory: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of the file, and its metadata."""
    file = directory / SAFETENSORS_WEIGHTS_NAME
    if not is_regular_file(file):
        raise CheckpointError(f"{directory}: has no {file.name}; save the adapter with safe_serialization=True")
    with (
        foreign_reader(file, "copy it again", "is not a whole safetensors file"),
        safe_open(file, framework="pt") as opened,
    ):
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (not a mapping)
        metadata = opened.metadata() or {}
    for key, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            allowed = ", ".join(str(dtype) for dtype in _DTYPES)
            raise CheckpointError(
                f"{file}: tensor {key!r} is {tensor.dtype}, must be one of {allowed}; save the adapter in one of them"
            )
    return tensors, metadata


def _spec(directory: Path, raw: dict[str, Any], metadata: Mapping[str, str]) -> AdapterSpec:
    """The adapter that the config describes, one per projection as PEFT holds it."""
    file = directory / CONFIG_NAME
    peft_type = raw.get("peft_type")
    if peft_type == MaloraPeftType.MALORA:
        names = {f.name for f in dataclasses.fields(AdapterSpec)} - {"fuse_projections"}
        fields = {name: raw[name] for name in names if name in raw}
        refused = {k: v for k, v in raw.items() if v and k not in names | _NEUTRAL_FIELDS}
    elif peft_type == "LORA":
        defaults = LoraConfig().to_dict()
        fields = {ours: raw.get(theirs, defaults[theirs]) for ours, theirs in _LORA_FIELDS.items()}
        stock = "dora" if raw.get("use_dora") else "lora"
        fields |= {"method": metadata.get(METADATA_METHOD, stock), "target_modules": raw.get("target_modules")}
        refused = _refused_lora_fields(raw, defaults)
    else:
        raise CheckpointError(f"{file}: peft_type={shown(peft_type)}, must be LORA or MALORA; train one of these")
    for key, value in refused.items():
        raise CheckpointError(f"{file}: {key}={shown(value)} has no place in this project; train an adapter without it")
    targets = fields.get("target_modules")
    if not isinstance(targets, list) or not all(target in PROJECTIONS for target in targets):
        raise CheckpointError(
            f"{file}: target_modules={shown(targets)}, must be a list from {', '.join(PROJECTIONS)}; "
            "name the adapted projections"
        )
    for name, value in fields.items():
        default = getattr(AdapterSpec(), name)
        allowed = int | float if isinstance(default, float) else type(default)
        is_of_type = isinstance(value, allowed) and isinstance(value, bool) == isinstance(default, bool)
        if not is_of_type or (isinstance(value, list) and not all(isinstance(item, str) for item in value)):
            wanted = "list of str" if isinstance(default, list) else type(default).__name__
            raise CheckpointError(f"{file}: {name}={shown(value)}, must be of type {wanted}; save the adapter again")
    try:
        refuse_former_malora(fields.get("method", "malora"), raw.get("rank_expansion"))
        spec = AdapterSpec(**fields)
        spec.validate_adapter()
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from error
    return spec


def _refused_lora_fields(raw: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a LoRA that its A and B alone do not tell; PEFT's defaults and empty values are none."""
    read = _NEUTRAL_FIELDS | {*_LORA_FIELDS.values(), "target_modules", "init_lora_weights", "use_dora"}
    refused = {k: v for k, v in raw.items() if v and k not in read and v != defaults.get(k)}
    if raw.get("init_lora_weights") not in _LORA_STARTS:
        refused["init_lora_weights"] = raw["init_lora_weights"]
    return refused
