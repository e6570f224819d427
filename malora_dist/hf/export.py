"""Writing a trained adapter as a PEFT directory: adapter_config.json + adapter_model.safetensors.

Methods without a router become ordinary PEFT LoRA or DoRA, which stock PEFT loads without this package;
the others become this package's tuner (``import malora_dist.hf`` before loading).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from peft import LoraConfig
from peft.config import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from malora_dist.files import check_replaceable, put_in_place, resolved
from malora_dist.hf.config import MaloraConfig
from malora_dist.hf.keys import METADATA_BASE, METADATA_METHOD, TensorKey, check_complete, saved_key
from malora_dist.methods.spec import AdapterSpec

_FILES = {CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME}


def write_peft_adapter(
    directory: Path,
    spec: AdapterSpec,
    tensors: Mapping[TensorKey, Tensor],
    base_model_name_or_path: str,
    base_fingerprint: str,
) -> None:
    """Write an adapter in PEFT's format: all of it, or nothing.

    PEFT adapts each projection by itself: what ``fuse_projections`` shares is written once per projection.

    Args:
        directory: new, empty, or an earlier export, which is replaced.
        tensors: every parameter of every adapted projection of every layer, unsharded, shaped as
            :meth:`Method.shape`. Layers have to be numbered without gaps.
        base_model_name_or_path: where PEFT finds the base.
        base_fingerprint: kept in the safetensors metadata with the method, and in the config of methods with a router.

    Raises:
        CheckpointError: missing, unexpected or misshapen tensors (all listed), or a directory that
            holds something else.
    """
    directory = resolved(directory)
    check_complete("adapter export", spec, tensors, "export an adapter of exactly this spec, unsharded")
    check_replaceable(directory, _FILES, also_part=True)
    config = _peft_config(spec, base_model_name_or_path, base_fingerprint)
    # clone(): safetensors refuses tensors that share memory, as the copies of a fused projection do
    state = {saved_key(spec, *key): t.detach().cpu().contiguous().clone() for key, t in sorted(tensors.items())}
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        metadata = {"format": "pt", METADATA_BASE: base_fingerprint, METADATA_METHOD: spec.method}
        save_file(state, temporary / SAFETENSORS_WEIGHTS_NAME, metadata)
        config.save_pretrained(str(temporary))
        put_in_place(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _peft_config(spec: AdapterSpec, base_model_name_or_path: str, base_fingerprint: str) -> PeftConfig:
    peft = spec.declared.peft
    if peft is None:
        return MaloraConfig(
            **spec.adapter_fields() | {"fuse_projections": False},
            task_type="CAUSAL_LM",
            inference_mode=True,
            base_model_name_or_path=base_model_name_or_path,
            base_fingerprint=base_fingerprint,
        )
    config = LoraConfig(
        r=spec.declared.rank,
        lora_alpha=spec.lora_alpha,  # type: ignore[arg-type] # annotated int, but any number works
        use_rslora=spec.use_rslora,
        use_dora=peft.use_dora,
        lora_dropout=spec.lora_dropout,
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=base_model_name_or_path,
    )
    config.target_modules = sorted(spec.projections)  # a set, if given to the constructor: saved in any order
    return config
