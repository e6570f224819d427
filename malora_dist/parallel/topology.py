"""The layout of a run: world, tensor, pipeline, data and expert parallel groups.

megatron-core's parallel_state holds the groups (its own global); everything of ours receives them
through :class:`Topology`.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, Store

from malora_dist.config_sections import ParallelConfig
from malora_dist.parallel.device import adapt_megatron, choose_device
from malora_dist.parallel.rendezvous import meet

#: NCCL keeps its last collectives, and writes them to files of TORCH_NCCL_DEBUG_INFO_TEMP_FILE when one times out.
_FLIGHT_RECORDER = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}


@dataclass(frozen=True)
class Topology:
    """This rank's place in the layout, the process groups it belongs to, and the store that all ranks share."""

    device: torch.device
    world_size: int
    rank: int
    tp_group: ProcessGroup
    pp_group: ProcessGroup
    dp_group: ProcessGroup
    ep_group: ProcessGroup
    edp_group: ProcessGroup
    store: Store

    @property
    def tp_size(self) -> int:
        return self.tp_group.size()

    @property
    def tp_rank(self) -> int:
        return self.tp_group.rank()

    @property
    def pp_size(self) -> int:
        return self.pp_group.size()

    @property
    def pp_rank(self) -> int:
        return self.pp_group.rank()

    @property
    def dp_size(self) -> int:
        return self.dp_group.size()

    @property
    def dp_rank(self) -> int:
        return self.dp_group.rank()

    @property
    def ep_size(self) -> int:
        return self.ep_group.size()

    @property
    def ep_rank(self) -> int:
        return self.ep_group.rank()

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def is_writer(self) -> bool:
        """Whether this is the one rank that reports: of the last stage, which has the losses."""
        return self.is_last_stage and self.dp_rank == 0 and self.tp_rank == 0

    @property
    def stage_of_rank(self) -> list[int]:
        """The pipeline stage of every rank: in megatron's order the stages are blocks of consecutive ranks."""
        return [rank * self.pp_size // self.world_size for rank in range(self.world_size)]

    @property
    def backend(self) -> str:
        return "nccl" if self.device.type == "cuda" else "gloo"

    def describe(self) -> str:
        """One line for the start-up banner."""
        sequence = " (sequence parallel)" if self.tp_size > 1 else ""
        return (
            f"{self.world_size} x {self.device.type} ({self.backend}): TP {self.tp_size}{sequence} x "
            f"PP {self.pp_size} x DP {self.dp_size}, EP {self.ep_size} inside DP"
        )


def world_size_from_env() -> int:
    """World size as torchrun sets it; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def place_on_machine() -> tuple[int, int]:
    """This process among those of its machine, and how many these are, as torchrun sets them; (0, 1) without it."""
    return int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _init_process_group(device: torch.device, timeout: datetime.timedelta) -> Store:
    """Join the world; the store that its ranks share."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    for name, value in _FLIGHT_RECORDER.items():
        os.environ.setdefault(name, value)
    store, rank, world_size = meet() if "RANK" in os.environ else (dist.HashStore(), 0, 1)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    return store


def initialize(config: ParallelConfig, seed: int = 1234) -> Topology:
    """Adapt megatron to the device, join the process group and build the layout.

    Under torchrun the rendezvous comes from its environment variables; without it the world is
    this one process. `config` must have been validated against the world size.

    Raises:
        BackendUnavailableError: the device asked for is not there.
    """
    device = choose_device(config.device)
    adapt_megatron(device)
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    timeout = datetime.timedelta(minutes=config.distributed_timeout_minutes)
    store = _init_process_group(device, timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=(
            config.virtual_pipeline_model_parallel_size if config.virtual_pipeline_model_parallel_size > 1 else None
        ),
        expert_model_parallel_size=config.expert_model_parallel_size,
        distributed_timeout_minutes=config.distributed_timeout_minutes,
        create_gloo_process_groups=False,
    )
    # Equal on all layouts at TP=1; with TP the trackers differ, so that sequence shards draw different masks.
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    assert parallel_state.get_expert_tensor_parallel_world_size() == config.tensor_model_parallel_size
    return Topology(
        device=device,
        world_size=dist.get_world_size(),
        rank=dist.get_rank(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        ep_group=parallel_state.get_expert_model_parallel_group(),
        edp_group=parallel_state.get_expert_data_parallel_group(),
        store=store,
    )


def destroy() -> None:
    """Leave all groups and drop what megatron-core keeps of them beyond that.

    A group lives as long as anything refers to it. gloo's then keeps three threads that wake a hundred
    times a second, and aborts at exit, now and then.
    """
    from megatron.core import parallel_state
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    parallel_state.destroy_model_parallel()
    for name, value in vars(parallel_state).items():
        if isinstance(value, ProcessGroup):  # megatron forgets a few
            setattr(parallel_state, name, None)
    RotaryEmbedding.forward.cache_clear()  # of the class: it holds modules, and they their groups
    if dist.is_initialized():
        dist.destroy_process_group()
