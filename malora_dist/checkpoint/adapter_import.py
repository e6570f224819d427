"""Writing an adapter's full tensors as a checkpoint that training can start from: the inverse of reading them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import torch

from malora_dist.checkpoint.base import TRACKER_FILE, hf_dir, iteration_name, read_base_info, staged_directory
from malora_dist.checkpoint.convert import AdapterWeights, stored_parameters
from malora_dist.checkpoint.manifest import write_manifest
from malora_dist.checkpoint.tensor_files import bits_equal
from malora_dist.checkpoint.torch_dist import TensorChunk, write_megatron_files, write_torch_dist
from malora_dist.errors import CheckpointError
from malora_dist.families.base import family_of
from malora_dist.families.conversion import conversion_map
from malora_dist.parallel.device import without_expected_warnings


def with_base(adapter: AdapterWeights, base: Path) -> AdapterWeights:
    """The adapter as one of the converted model in `base`.

    Raises:
        CheckpointError: not a converted base, or the adapter belongs to another or does not fit its layers or widths.
    """
    info = read_base_info(base)
    if adapter.base_fingerprint not in ("", info.fingerprint):
        raise CheckpointError(
            f"{base}: has fingerprint {info.fingerprint[:12]}, but the adapter was trained on "
            f"{adapter.base_model_name_or_path} with {adapter.base_fingerprint[:12]}; name that base"
        )
    family = family_of(hf_dir(base))
    expected_layers, num_layers = family.hf.num_hidden_layers, _num_layers(adapter)
    if num_layers != expected_layers:
        raise CheckpointError(
            f"{base}: has {expected_layers} layers, the adapter {num_layers}; name the base it was trained on"
        )
    weights = [chunk.hf_shapes for chunk in conversion_map(family) if chunk.layer == 0]
    shapes = {key.split(".")[-2]: shape for hf_shapes in weights for key, shape in hf_shapes.items()}
    for (layer, projection, name), tensor in adapter.tensors.items():
        out_features, in_features = shapes[projection]
        expected = adapter.spec.declared.shape(name, in_features, out_features)
        if tuple(tensor.shape) != expected:
            raise CheckpointError(
                f"{base}: its {projection} is {in_features} -> {out_features}, for which layers.{layer}.{projection}."
                f"{name} must be {list(expected)}, not {list(tensor.shape)}; name the base the adapter was trained on"
            )
    return dataclasses.replace(
        adapter, base_fingerprint=info.fingerprint, base_model_name_or_path=info.hf_model_name_or_path
    )


def write_adapter_weights(save_dir: Path, adapter: AdapterWeights) -> None:
    """Write an adapter as a checkpoint without optimizer state, from which training can start on any layout.

    With ``fuse_projections`` in the spec, what its groups share is written once.

    Args:
        save_dir: new, empty, or an earlier result of this function, which is replaced.
        adapter: complete; the tensors are written as float32, as training keeps them.

    Raises:
        CheckpointError: the copies of what a group shares differ, or `save_dir` holds something else.
    """
    with without_expected_warnings():  # imports megatron
        from malora_dist.checkpoint.adapter import AdapterInfo, write_adapter_info
    num_layers = _num_layers(adapter)
    chunks = []
    for key, (name, projections) in stored_parameters(adapter.spec).items():
        _check_copies_are_equal(adapter, num_layers, name, projections)
        stacked = torch.stack([adapter.tensors[layer, projections[0], name] for layer in range(num_layers)]).float()
        offset, shape = (0,) * stacked.dim(), tuple(stacked.shape)
        chunks.append(TensorChunk(key, stacked.dtype, shape, offset, shape, stacked.contiguous))
    origin = adapter.base_fingerprint, adapter.base_model_name_or_path
    info = AdapterInfo(adapter.spec, *origin, adapter.iteration, num_layers, has_optimizer=False)
    name = iteration_name(adapter.iteration)
    with staged_directory(save_dir, {TRACKER_FILE, name}) as staging:
        write_torch_dist(staging / name, chunks)
        write_megatron_files(staging / name)
        write_adapter_info(staging / name, info)
        write_manifest(staging / name)
        (staging / TRACKER_FILE).write_text(f"{adapter.iteration}\n", encoding="utf-8")


def _num_layers(adapter: AdapterWeights) -> int:
    return 1 + max(layer for layer, _, _ in adapter.tensors)


def _check_copies_are_equal(adapter: AdapterWeights, num_layers: int, name: str, projections: Sequence[str]) -> None:
    """What a group shares is the same in all its projections, or all but one would be lost."""
    first = projections[0]
    for layer, projection in itertools.product(range(num_layers), projections[1:]):
        if not bits_equal(adapter.tensors[layer, first, name], adapter.tensors[layer, projection, name]):
            raise CheckpointError(
                f"fuse_projections=True: layers.{layer} would keep one {name} for {', '.join(projections)}, but those "
                f"of {first} and {projection} differ; import the adapter without --fuse-projections"
            )
