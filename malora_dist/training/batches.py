"""The microbatches of this rank, on its device, from the data package."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from malora_dist.config import Config
from malora_dist.data.batches import Microbatch, train_microbatches, validation_microbatches
from malora_dist.data.dataset import load_tasks
from malora_dist.data.schedule import SampleSchedule
from malora_dist.parallel.topology import Topology

#: Sequences are padded to a multiple of this, so that few different shapes occur.
PAD_MULTIPLE = 8


class BatchSource:
    """Training and validation microbatches for one rank of a layout.

    Raises:
        DataError: from construction, for a file or record that cannot be used.
    """

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase, topology: Topology) -> None:
        self._config, self._topology = config, topology
        self._tasks = load_tasks(config, tokenizer, config.seed)
        self._schedule = SampleSchedule(
            [len(task.train) for task in self._tasks], [task.weight for task in config.data], config.seed
        )
        pad = tokenizer.pad_token_id
        self._pad_token_id = int(tokenizer.eos_token_id if pad is None else pad)
        self._multiple = math.lcm(PAD_MULTIPLE, topology.tp_size)

    @property
    def task_names(self) -> list[str]:
        return [task.name for task in self._tasks]

    def train(self, consumed_samples: int) -> list[Microbatch]:
        """This rank's microbatches of the optimizer step that starts after ``consumed_samples``."""
        microbatches = train_microbatches(
            self._tasks,
            self._schedule,
            consumed_samples,
            micro_batch_size=self._config.micro_batch_size,
            global_batch_size=self._config.global_batch_size,
            data_parallel_rank=self._topology.dp_rank,
            data_parallel_size=self._topology.dp_size,
            pad_token_id=self._pad_token_id,
            multiple_of=self._multiple,
        )
        return [self._on_device(microbatch) for microbatch in microbatches]

    def validation(self) -> Iterator[list[Microbatch]]:
        """Per task with a validation split, this rank's microbatches of it."""
        for index, task in enumerate(self._tasks):
            if task.validation:
                microbatches = validation_microbatches(
                    task,
                    index,
                    micro_batch_size=self._config.micro_batch_size,
                    eval_iters=self._config.eval_iters,
                    data_parallel_rank=self._topology.dp_rank,
                    data_parallel_size=self._topology.dp_size,
                    pad_token_id=self._pad_token_id,
                    multiple_of=self._multiple,
                )
                yield [self._on_device(microbatch) for microbatch in microbatches]

    def global_token_counts(self, microbatches: list[Microbatch]) -> tuple[int, int]:
        """(answer tokens, tokens without padding) of the global batch; called by all ranks."""
        counts = torch.zeros(2, dtype=torch.int64, device=self._topology.device)
        for microbatch in microbatches:
            counts[0] += microbatch.loss_mask_BS.sum().long()
            counts[1] += (microbatch.token_task_BS > 0).sum()
        dist.all_reduce(counts, group=self._topology.dp_group)
        answer_tokens, tokens = counts.tolist()
        return answer_tokens, tokens

    def describe(self) -> str:
        """One line per task for the start-up banner."""
        return "\n".join(f"task        {task.report}" for task in self._tasks)

    def _on_device(self, microbatch: Microbatch) -> Microbatch:
        device = self._topology.device
        moved = {
            field.name: getattr(microbatch, field.name).to(device, non_blocking=True)
            for field in dataclasses.fields(microbatch)
            if isinstance(getattr(microbatch, field.name), Tensor)
        }
        return dataclasses.replace(microbatch, **moved)
