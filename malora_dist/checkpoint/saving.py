"""Writing adapter checkpoints: aside, checked by a manifest, and published by one rename.

A checkpoint comes about in three parts. :meth:`CheckpointWriter.begin` finds out what each rank has to write and, with
`async_save`, copies it to host memory; then every rank writes its file, with `async_save` in a thread, and no rank
waits for another; :meth:`CheckpointWriter.finish` brings the parts together. Whatever fails on one rank is an error of
all, and leaves the checkpoints that were there.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess

from malora_dist.checkpoint import run_directory
from malora_dist.checkpoint.adapter import AdapterInfo, Trained, sharded_state, write_adapter_info
from malora_dist.checkpoint.base import iteration_name
from malora_dist.checkpoint.manifest import write_manifest
from malora_dist.checkpoint.torch_dist import Share, TensorChunk, write_megatron_files, write_metadata, write_share
from malora_dist.config import Config
from malora_dist.config_file import save_config
from malora_dist.errors import CheckpointError
from malora_dist.parallel.collectives import on_one_rank
from malora_dist.parallel.device import without_expected_warnings
from malora_dist.parallel.topology import Topology

#: What goes wrong with a disk. torch reports one that is full as a RuntimeError of its archive writer.
_DISK_ERRORS = (OSError, RuntimeError)


@dataclass
class _Pending:
    """A checkpoint that is being written: this rank's share of it."""

    info: AdapterInfo
    common: dict[str, Any]
    thread: threading.Thread | None = None
    share: Share | None = None
    fault: str = ""
    chunks: list[TensorChunk] = field(default_factory=list)
    objects: dict[str, object] = field(default_factory=dict)


class CheckpointWriter:
    """Writes the checkpoints of one run into its `save`; every method is called by all ranks.

    Args:
        origin: what all checkpoints of the run say in `adapter.json`.
    """

    def __init__(self, config: Config, origin: AdapterInfo, topology: Topology) -> None:
        self._config, self._origin, self._topology = config, origin, topology
        self._save = Path(config.save)
        self._pending: _Pending | None = None

    def prepare(self, goes_on_here: bool, best: int | None = None) -> None:
        """Make `save` ready before the first step.

        Args:
            goes_on_here: the run starts from a checkpoint in it.
            best: the iteration of the best checkpoint in it, as far as this run knows.

        Raises:
            CheckpointError: it cannot be written, or holds checkpoints of another run.
        """

        def make_ready() -> None:
            self._save.mkdir(parents=True, exist_ok=True)
            run_directory.sweep(self._save)
            if not goes_on_here:
                if self._config.overwrite:
                    run_directory.remove_all(self._save)
                run_directory.check_free(self._save)
            run_directory.name_best(self._save, best)

        self._on_first_rank(make_ready)

    @property
    def is_pending(self) -> bool:
        """Whether a checkpoint was begun and is not finished."""
        return self._pending is not None

    def begin(self, trained: Trained, best: Mapping[str, Any]) -> None:
        """Start to write a checkpoint; with `async_save` training may go on from here.

        Args:
            best: goes into `adapter.json`, see :class:`AdapterInfo`.

        Raises:
            CheckpointError: `save` cannot be written.
        """
        assert self._pending is None, "finish the one before first"
        iteration = trained.iteration
        self._on_first_rank(lambda: run_directory.start_writing(self._save, iteration))
        with without_expected_warnings():
            sharded, common = save_preprocess(sharded_state(trained, self._topology, is_loading=False))
        info = replace(self._origin, iteration=iteration, best=best)
        pending = _Pending(info, copy.deepcopy(common))
        for value in nested_values(sharded):
            if not is_main_replica(value.replica_id):
                continue
            if isinstance(value, ShardedTensor):
                pending.chunks.append(_chunk(value, copies=self._config.async_save))
            elif isinstance(value, ShardedObject):
                pending.objects[value.unique_key] = copy.deepcopy(value.data)
        self._pending = pending
        if self._config.async_save:
            pending.thread = threading.Thread(target=self._write, args=(pending,), name="checkpoint", daemon=True)
            pending.thread.start()
        else:
            self._write(pending)

    def is_written(self) -> bool:
        """Whether every rank has written its share of the pending checkpoint."""
        assert self._pending is not None
        thread = self._pending.thread
        is_mine = torch.tensor(int(thread is None or not thread.is_alive()), device=self._topology.device)
        dist.all_reduce(is_mine, op=dist.ReduceOp.MIN)
        return bool(is_mine.item())

    def finish(self) -> Path:
        """Wait for the pending checkpoint and publish it; its directory.

        Raises:
            CheckpointError: it could not be written; the checkpoints before it are untouched.
        """
        pending, self._pending = self._pending, None
        assert pending is not None
        if pending.thread is not None:
            pending.thread.join()
        written: list[Any] = [None] * self._topology.world_size
        dist.all_gather_object(written, pending.fault or pending.share)
        try:
            fault = next((fault for fault in written if isinstance(fault, str)), "")
            self._on_first_rank(lambda: self._complete(pending, written), fault)
        except CheckpointError:
            if self._topology.rank == 0:
                run_directory.abandon(self._save, pending.info.iteration)
            raise
        return self._save / iteration_name(pending.info.iteration)

    def _write(self, pending: _Pending) -> None:
        """This rank's data file. Runs in a thread, so an error is kept for :meth:`finish`."""
        directory = run_directory.partial_directory(self._save, pending.info.iteration)
        try:
            pending.share = write_share(directory, self._topology.rank, pending.chunks, pending.objects)
        except Exception as error:  # noqa: BLE001  whatever it is, the others wait to be told
            pending.fault = self._cannot_write(error)
        pending.chunks.clear()

    def _complete(self, pending: _Pending, shares: list[Share]) -> None:
        """All that one rank does for all."""
        iteration = pending.info.iteration
        directory = run_directory.partial_directory(self._save, iteration)
        write_metadata(directory, shares)
        write_megatron_files(directory, pending.common)
        write_adapter_info(directory, pending.info)
        save_config(self._config, directory / "config.yaml")
        write_manifest(directory)
        run_directory.publish(self._save, iteration)
        best = pending.info.best.get("iteration") if self._config.keep_best else None
        if best == iteration:
            run_directory.name_best(self._save, iteration)
        run_directory.remove_old(self._save, iteration, self._config.keep_last, best)

    def _on_first_rank(self, action: Callable[[], None], fault: str = "") -> None:
        """Let the first rank act, unless there is a fault already; what fails there is an error of all."""

        def act() -> None:
            if fault:
                raise CheckpointError(fault)
            try:
                action()
            except _DISK_ERRORS as error:
                raise CheckpointError(self._cannot_write(error)) from error

        on_one_rank(self._topology.rank == 0, act, CheckpointError)

    def _cannot_write(self, error: BaseException) -> str:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        return f"save={str(self._save)!r}: cannot be written ({reason}); free space or mend the disk, then resume"


def _chunk(sharded: ShardedTensor, copies: bool) -> TensorChunk:
    """A tensor of megatron's as what is written.

    Args:
        copies: take its values now, to host memory.
    """
    tensor = sharded.data.detach().contiguous().view((1,) * sharded.prepend_axis_num + tuple(sharded.local_shape))
    if copies:
        tensor = tensor.to("cpu", copy=True)
    place = tuple(sharded.global_shape), tuple(sharded.global_offset), tuple(tensor.shape)
    return TensorChunk(sharded.key, tensor.dtype, *place, load=lambda: tensor)
