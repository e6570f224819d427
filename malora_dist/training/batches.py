"""The microbatches of this rank, on its device, from the data package."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from malora_dist.config import Config
from malora_dist.data.batches import BatchLayout, Microbatch, train_microbatches, validation_microbatches
from malora_dist.data.dataset import data_fingerprints, data_paths, load_tasks
from malora_dist.data.schedule import SampleSchedule
from malora_dist.errors import DataError
from malora_dist.parallel.topology import Topology
from malora_dist.progress import Progress

#: Sequences are padded to a multiple of this, so that few different shapes occur.
PAD_MULTIPLE = 8


class GlobalCounts(NamedTuple):
    """What all ranks' microbatches of a step hold together.

    Attributes:
        answer_tokens: labels that the loss is taken on.
        tokens: positions without padding.
        microbatches: those that are not all padding.
        pairs: of a token and one that it sees in attention, itself included.
    """

    answer_tokens: int
    tokens: int
    microbatches: int
    pairs: int


class BatchSource:
    """Training and validation microbatches for one rank of a layout.

    Attributes:
        fingerprints: of the data, see :func:`data_fingerprints`.

    Args:
        microbatch_multiple: every rank gets a multiple of so many microbatches, as interleaved
            pipeline schedules want.

    Raises:
        DataError: from construction, for a file or record that cannot be used, or that is not the same on all ranks.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: PreTrainedTokenizerBase,
        topology: Topology,
        progress: Progress,
        microbatch_multiple: int = 1,
    ) -> None:
        self._config, self._topology = config, topology
        self._tasks = load_tasks(config, tokenizer, config.seed, progress)
        self.fingerprints = data_fingerprints(self._tasks)
        _check_same_on_all_ranks(self.fingerprints, data_paths(config), topology.device)
        self._schedule = SampleSchedule(
            [len(task.train) for task in self._tasks], [task.weight for task in config.data], config.seed
        )
        pad = tokenizer.pad_token_id
        self._layout = BatchLayout(
            micro_batch_size=config.micro_batch_size,
            pad_token_id=int(tokenizer.eos_token_id if pad is None else pad),
            data_parallel_rank=topology.dp_rank,
            data_parallel_size=topology.dp_size,
            multiple_of=math.lcm(PAD_MULTIPLE, topology.tp_size),
            row_length=config.seq_length if config.packing else None,
            microbatch_multiple=microbatch_multiple,
        )

    @property
    def task_names(self) -> list[str]:
        return [task.name for task in self._tasks]

    @property
    def evaluated_tasks(self) -> list[str]:
        """Those with a validation split."""
        return [task.name for task in self._tasks if task.validation]

    def train(self, consumed_samples: int) -> list[Microbatch]:
        """This rank's microbatches of the optimizer step that starts after ``consumed_samples``."""
        microbatches = train_microbatches(
            self._tasks,
            self._schedule,
            consumed_samples,
            self._config.global_batch_size,
            self._layout,
        )
        return [self._on_device(microbatch) for microbatch in microbatches]

    def sources(self, consumed_samples: int) -> list[str]:
        """Where the samples of the optimizer step that starts after ``consumed_samples`` stand, for messages."""
        samples = self._schedule.samples(consumed_samples, self._config.global_batch_size)
        return [self._tasks[task].train[i].source for task, i in samples]

    def validation(self) -> Iterator[list[Microbatch]]:
        """Per task with a validation split, this rank's microbatches of it."""
        for index, task in enumerate(self._tasks):
            if task.validation:
                microbatches = validation_microbatches(task, index, self._config.eval_iters, self._layout)
                yield [self._on_device(microbatch) for microbatch in microbatches]

    def global_token_counts(self, microbatches: list[Microbatch]) -> GlobalCounts:
        """Counts of the global batch; called by all ranks."""
        counts = torch.zeros(4, dtype=torch.int64, device=self._topology.device)
        for microbatch in microbatches:
            is_token_BS = microbatch.token_task_BS > 0
            tokens, pairs = is_token_BS.sum(), ((microbatch.position_ids_BS + 1) * is_token_BS).sum()
            counts += torch.stack((microbatch.loss_mask_BS.sum().long(), tokens, (tokens > 0).long(), pairs))
        dist.all_reduce(counts, group=self._topology.dp_group)
        return GlobalCounts(*counts.tolist())

    def describe(self) -> str:
        """One line per task for the start-up banner, and one per record that is told as skipped."""
        return "\n".join(f"task        {task.report}".replace("\n", f"\n{'':12}") for task in self._tasks)

    def _on_device(self, microbatch: Microbatch) -> Microbatch:
        device = self._topology.device
        moved = {
            field.name: getattr(microbatch, field.name).to(device, non_blocking=True)
            for field in dataclasses.fields(microbatch)
            if isinstance(getattr(microbatch, field.name), Tensor)
        }
        return dataclasses.replace(microbatch, **moved)


def _check_same_on_all_ranks(fingerprints: Mapping[str, str], paths: Mapping[str, str], device: torch.device) -> None:
    """Refuse data that changed between the ranks' reading, or of which nodes hold different copies.

    Raises:
        DataError: on all ranks, naming the file and the ranks.
    """
    mine = torch.tensor([list(bytes.fromhex(digest)) for digest in fingerprints.values()], dtype=torch.uint8).to(device)
    of_ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(of_ranks, mine)
    for rank, theirs in enumerate(of_ranks):
        for i, name in enumerate(fingerprints):
            if not torch.equal(theirs[i], of_ranks[0][i]):
                file = paths.get(name) or paths[name.replace("/split", "/train")]
                raise DataError(
                    f"{file}: ranks 0 and {rank} have read different contents ({name}); "
                    "give all machines the same file, and do not change it while a run starts"
                )
