"""Conversions between Hugging Face directories and megatron checkpoints, one tensor at a time in memory."""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from malora_dist.checkpoint.base import (
    BASE_LAYOUT,
    TRACKER_FILE,
    BaseInfo,
    checkpoint_dir,
    copy_hf_files,
    has_manifest,
    hf_dir,
    iteration_name,
    read_base_info,
    staged_directory,
    write_base_info,
)
from malora_dist.checkpoint.manifest import verify, write_manifest
from malora_dist.checkpoint.tensor_files import Fingerprint, HfWeights, bits_equal
from malora_dist.checkpoint.torch_dist import TensorChunk, TorchDistReader, write_megatron_files, write_torch_dist
from malora_dist.errors import CheckpointError
from malora_dist.families.base import Family, family_of
from malora_dist.families.conversion import (
    Chunk,
    check_coverage,
    conversion_map,
    extra_state_keys,
    redundant_keys,
)
from malora_dist.methods.spec import MEGATRON_LINEARS, AdapterSpec
from malora_dist.parallel.device import without_expected_warnings
from malora_dist.pretrained import check_companions

DEFAULT_SHARD_BYTES = 4 * 10**9


def import_hf(hf_model: Path, megatron_path: Path) -> BaseInfo:
    """Convert a Hugging Face model into a base that trains on any layout; dtypes and bits are kept.

    Everything is written beside `megatron_path` and renamed at the end, so that a conversion that
    was stopped leaves nothing under that name. An earlier conversion there is replaced.

    Peak memory is one fused weight and the tensors that it is made of.

    Raises:
        CheckpointError: not a supported model, a tensor that is unknown, missing or of the wrong
            shape, or a `megatron_path` that holds something else.
    """
    hf_model = Path(hf_model)
    family, weights = _open_hf(hf_model)
    check_companions(hf_model)
    chunks = conversion_map(family)
    _check_one_dtype_per_stack(hf_model, weights, chunks)
    fingerprint = Fingerprint()

    def load(chunk: Chunk) -> Tensor:
        tensors = {key: weights.read(key) for key in chunk.hf_shapes}
        for key, tensor in tensors.items():
            fingerprint.add(key, tensor)
        return chunk.fuse(tensors)

    def stored(chunk: Chunk) -> TensorChunk:
        dtype = weights.dtypes[next(iter(chunk.hf_shapes))]
        return TensorChunk(
            chunk.key, dtype, chunk.global_shape, chunk.offset, chunk.shape, functools.partial(load, chunk)
        )

    with staged_directory(megatron_path, BASE_LAYOUT) as staging:
        iteration_dir = staging / iteration_name(0)
        progress = functools.partial(tqdm, desc="import", unit="tensor", disable=None)
        write_torch_dist(
            iteration_dir, [stored(chunk) for chunk in chunks], extra_state_keys(family.hf.num_hidden_layers), progress
        )
        write_megatron_files(iteration_dir)
        copy_hf_files(hf_model, hf_dir(staging))
        sizes = Counter[str]()
        for key in _needed_keys(chunks):
            sizes[str(weights.dtypes[key]).removeprefix("torch.")] += torch.Size(weights.shapes[key]).numel()
        info = BaseInfo(
            fingerprint=fingerprint.hexdigest(),
            hf_model_name_or_path=str(hf_model.resolve()),
            dtype=sizes.most_common(1)[0][0],
            num_parameters=sizes.total(),
        )
        write_base_info(staging, info)
        (staging / TRACKER_FILE).write_text("0\n", encoding="utf-8")
        write_manifest(staging)
    return info


def export_hf(megatron_path: Path, hf_path: Path, max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> int:
    """Write a converted base as a Hugging Face directory, bit for bit what was imported.

    Peak memory is one file of `max_shard_bytes` plus one layer's largest weight.

    Returns:
        The number of tensors written.

    Raises:
        CheckpointError: not a whole converted base, its weights are not those that were imported,
            or `hf_path` is not empty.
    """
    if has_manifest(megatron_path):
        verify(megatron_path, threads=os.cpu_count() or 1)
    info = read_base_info(megatron_path)
    reader = TorchDistReader(checkpoint_dir(megatron_path))
    chunks = conversion_map(family_of(hf_dir(megatron_path)))
    _check_stored_tensors(megatron_path, reader, chunks)
    shards = list(_split_into_shards(chunks, reader, max_shard_bytes))
    fingerprint = Fingerprint()
    weight_map: dict[str, str] = {}
    total_bytes = 0
    with staged_directory(hf_path) as staging, tqdm(total=len(chunks), desc="export", disable=None) as bar:
        for number, shard in enumerate(shards, start=1):
            name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors: dict[str, Tensor] = {}
            for chunk in shard:
                tensors |= chunk.split(reader.read(chunk.key, chunk.offset, chunk.shape))
                bar.update()
            for key, tensor in tensors.items():
                fingerprint.add(key, tensor)
                weight_map[key] = name
                total_bytes += tensor.nbytes
            save_file(tensors, staging / name, metadata={"format": "pt"})
        if fingerprint.hexdigest() != info.fingerprint:
            raise CheckpointError(f"{megatron_path}: its weights have changed since the import; import the model again")
        if len(shards) > 1:
            index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (staging / "model.safetensors.index.json").write_text(text, encoding="utf-8")
        copy_hf_files(hf_dir(megatron_path), staging)
    return len(weight_map)


def roundtrip(
    hf_model: Path,
    megatron_path: Path | None = None,
    hf_path: Path | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> int:
    """Import, export and compare every tensor bit by bit; directories not named are temporary.

    Returns:
        The number of tensors compared, all equal.

    Raises:
        CheckpointError: naming the first tensor that differs.
    """
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="malora-roundtrip-")))
        megatron_path, hf_path = megatron_path or scratch / "megatron", hf_path or scratch / "hf"
        import_hf(hf_model, megatron_path)
        export_hf(megatron_path, hf_path, max_shard_bytes)
        family, before = _open_hf(hf_model)
        after = HfWeights(hf_path)
        # import_hf has checked that what is left out here carries nothing of its own.
        expected = before.shapes.keys() - set(redundant_keys(family, before.shapes))
        for key in sorted(expected ^ after.shapes.keys()):
            raise CheckpointError(f"{hf_path}: tensor {key!r} is on one side only; report this as a bug")
        for key in tqdm(sorted(expected), desc="compare", unit="tensor", disable=None):
            if not bits_equal(before.read(key), after.read(key)):
                raise CheckpointError(f"{hf_path}: tensor {key!r} differs from {hf_model}; report this as a bug")
        return len(expected)


def fingerprint_hf(hf_model: Path) -> str:
    """Fingerprint of a Hugging Face model, the one that `import_hf` stores.

    Raises:
        CheckpointError: as `import_hf`.
    """
    family, weights = _open_hf(Path(hf_model))
    fingerprint = Fingerprint()
    for key in tqdm(_needed_keys(conversion_map(family)), desc="fingerprint", unit="tensor", disable=None):
        fingerprint.add(key, weights.read(key))
    return fingerprint.hexdigest()


@dataclass(frozen=True)
class AdapterWeights:
    """The full tensors of an adapter checkpoint, one adapter per projection also where a checkpoint shares them.

    Attributes:
        tensors: {(0-based layer, Hugging Face projection, parameter name): tensor}, shapes as
            ``Method.shape``.
        directory: the `iter_*` directory it was read from.
    """

    spec: AdapterSpec
    tensors: Mapping[tuple[int, str, str], Tensor]
    base_model_name_or_path: str
    base_fingerprint: str
    iteration: int
    directory: Path = Path()


def read_adapter_weights(save_dir: Path, tell: Callable[[str], None] = print) -> AdapterWeights:
    """Read the newest sound adapter checkpoint of a training run, whatever layout wrote it.

    Args:
        save_dir: the run's `save`, or one `iter_*` directory in it.
        tell: is told which newer checkpoints were passed over and why, a line each.

    Raises:
        CheckpointError: not an adapter checkpoint, half-written, or its tensors are not those of
            the adapter it describes.
    """
    with without_expected_warnings():  # imports megatron, which the other conversions do without
        from malora_dist.checkpoint.start import newest_sound
    directory, info, notes = newest_sound(save_dir)
    for note in notes:
        tell(note)
    reader = TorchDistReader(directory)
    expected = stored_parameters(info.spec)
    found = {key for key in reader.tensors if key.startswith("decoder.")}
    for key in sorted(found ^ expected.keys()):
        fault = "is not part of the adapter it describes" if key in found else "is missing"
        raise CheckpointError(f"{directory}: tensor {key!r} {fault}; use a checkpoint that training wrote")
    tensors: dict[tuple[int, str, str], Tensor] = {}
    for key, (name, projections) in expected.items():
        stacked = reader.read(key)
        if stacked.shape[0] != info.num_layers:
            raise CheckpointError(
                f"{directory}: tensor {key!r} has {stacked.shape[0]} layers, adapter.json says {info.num_layers}; "
                "use a checkpoint that training wrote"
            )
        tensors |= {(layer, p, name): tensor for layer, tensor in enumerate(stacked) for p in projections}
    origin = info.base_name_or_path, info.base_fingerprint
    return AdapterWeights(info.spec, tensors, *origin, info.iteration, directory)


def stored_parameters(spec: AdapterSpec) -> dict[str, tuple[str, tuple[str, ...]]]:
    """{key of the stacked tensor in a checkpoint: (parameter, projections that it belongs to)}."""
    stored: dict[str, tuple[str, tuple[str, ...]]] = {}
    for adapter, projections in spec.adapters:
        linear = next(linear for linear, fused in MEGATRON_LINEARS.items() if projections[0] in fused)
        block = "mlp" if linear.startswith("linear_fc") else "self_attention"
        prefix = f"decoder.layers.{block}.{linear}.adapters.{adapter}"
        stored |= {f"{prefix}.{key}": served for key, served in spec.stored_parameters(projections).items()}
    return stored


def _open_hf(hf_model: Path) -> tuple[Family, HfWeights]:
    """A Hugging Face model that can be converted without loss, and its weights."""
    family = family_of(hf_model)
    weights = HfWeights(hf_model)
    check_coverage(hf_model, family, weights.shapes)
    output, embedding = family.output_key, family.embedding_key
    if (
        family.hf.tie_word_embeddings
        and output in weights.shapes
        and not bits_equal(weights.read(output), weights.read(embedding))
    ):
        raise CheckpointError(
            f"{hf_model}: tensor {output!r} differs from {embedding!r}, but config.json has "
            "tie_word_embeddings=True; set it to false"
        )
    return family, weights


def _check_one_dtype_per_stack(hf_model: Path, weights: HfWeights, chunks: Iterable[Chunk]) -> None:
    """Tensors that megatron keeps in one must have one dtype, or some would lose bits."""
    first: dict[str, str] = {}
    for chunk in chunks:
        for key in chunk.hf_shapes:
            other = first.setdefault(chunk.key, key)
            if weights.dtypes[key] != weights.dtypes[other]:
                raise CheckpointError(
                    f"{hf_model}: tensor {key!r} is {weights.dtypes[key]}, but {other!r}, which megatron keeps "
                    f"in the same tensor, is {weights.dtypes[other]}; save the model in one dtype"
                )


def _check_stored_tensors(megatron_path: Path, reader: TorchDistReader, chunks: Iterable[Chunk]) -> None:
    """The base holds the tensors of its config, no more and no less."""
    expected = {chunk.key: chunk.global_shape for chunk in chunks}
    stored = {key: tuple(metadata.size) for key, metadata in reader.tensors.items()}
    for key in sorted(expected.keys() | stored.keys()):
        if expected.get(key) != stored.get(key):
            raise CheckpointError(
                f"{megatron_path}: tensor {key!r} is {stored.get(key, 'missing')}, but by hf/config.json must be "
                f"{expected.get(key, 'absent')}; import the model again"
            )


def _split_into_shards(chunks: Iterable[Chunk], reader: TorchDistReader, max_bytes: int) -> Iterator[list[Chunk]]:
    """Consecutive chunks of at most `max_bytes` together; a larger one stands alone."""
    shard: list[Chunk] = []
    size = 0
    for chunk in chunks:
        nbytes = torch.Size(chunk.shape).numel() * reader.tensors[chunk.key].properties.dtype.itemsize
        if shard and size + nbytes > max_bytes:
            yield shard
            shard, size = [], 0
        shard.append(chunk)
        size += nbytes
    yield shard


def _needed_keys(chunks: Iterable[Chunk]) -> list[str]:
    return [key for chunk in chunks for key in chunk.hf_shapes]
