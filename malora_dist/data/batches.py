"""Microbatches: tensors of a fixed layout, and which rank gets which.

Shape suffixes: B sequences of a microbatch, S positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from malora_dist.data.dataset import TaskDataset
from malora_dist.data.schedule import SampleSchedule
from malora_dist.data.tokenization import TokenizedExample

#: (task index, sample)
Sample = tuple[int, TokenizedExample]

_NOTHING: Sample = (0, TokenizedExample([], []))


@dataclass(frozen=True)
class Microbatch:
    """One forward pass, padded on the right. Causal attention needs no padding mask.

    A sequence of n tokens takes n - 1 positions: its last token is only a label.

    Attributes:
        tokens_BS: int64 inputs.
        labels_BS: int64, the next token; the pad token on padding.
        loss_mask_BS: float32, 1 where the label is a trained token, EOS included.
        position_ids_BS: int64, 0 .. S - 1 in each row.
        token_task_BS: int64, 0 on padding, task index + 1 on real tokens.
    """

    tokens_BS: Tensor
    labels_BS: Tensor
    loss_mask_BS: Tensor
    position_ids_BS: Tensor
    token_task_BS: Tensor


def collate(samples: Sequence[Sample], pad_token_id: int, multiple_of: int = 1) -> Microbatch:
    """Samples as the rows of one microbatch, S the longest rounded up to ``multiple_of``.

    A sample without tokens gives a row of padding.
    """
    longest = max([1, *(len(sample.token_ids) - 1 for _, sample in samples)])
    shape = len(samples), -(-longest // multiple_of) * multiple_of
    tokens_BS = torch.full(shape, pad_token_id)
    labels_BS = torch.full(shape, pad_token_id)
    loss_mask_BS = torch.zeros(shape)
    token_task_BS = torch.zeros(shape, dtype=torch.int64)
    for row, (task, sample) in enumerate(samples):
        length = max(0, len(sample.token_ids) - 1)
        ids = torch.tensor(sample.token_ids, dtype=torch.int64)
        tokens_BS[row, :length] = ids[:-1]
        labels_BS[row, :length] = ids[1:]
        loss_mask_BS[row, :length] = torch.tensor(sample.trained[1:], dtype=torch.float32)
        token_task_BS[row, :length] = task + 1
    position_ids_BS = torch.arange(shape[1]).repeat(shape[0], 1)
    return Microbatch(tokens_BS, labels_BS, loss_mask_BS, position_ids_BS, token_task_BS)


def train_microbatches(
    tasks: Sequence[TaskDataset],
    schedule: SampleSchedule,
    consumed: int,
    *,
    micro_batch_size: int,
    global_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    pad_token_id: int,
    multiple_of: int = 1,
) -> list[Microbatch]:
    """This rank's microbatches of the optimizer step that follows ``consumed`` samples.

    The step's microbatch j holds its samples j * micro_batch_size onwards and goes to rank
    j mod DP: what is in a step, and what shares a microbatch, does not depend on DP.

    Raises:
        ValueError: global_batch_size is no multiple of micro_batch_size * data_parallel_size.
    """
    width = micro_batch_size * data_parallel_size
    if global_batch_size % width:
        raise ValueError(f"global_batch_size={global_batch_size} is no multiple of micro_batch_size * DP = {width}")
    samples = [(task, tasks[task].train[i]) for task, i in schedule.samples(consumed, global_batch_size)]
    return _share(samples, micro_batch_size, data_parallel_rank, data_parallel_size, pad_token_id, multiple_of)


def validation_microbatches(
    task: TaskDataset,
    index: int,
    *,
    micro_batch_size: int,
    eval_iters: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    pad_token_id: int,
    multiple_of: int = 1,
) -> list[Microbatch]:
    """This rank's share of the first ``eval_iters`` microbatches of a task's validation split.

    Every rank gets the same number of microbatches, all of micro_batch_size rows: what is missing
    is filled with padding, which no loss counts. The union over ranks does not depend on DP.

    Args:
        index: the task's index, for token_task_BS.
    """
    samples = [(index, sample) for sample in task.validation[: eval_iters * micro_batch_size]]
    samples += [_NOTHING] * (-len(samples) % (micro_batch_size * data_parallel_size))
    return _share(samples, micro_batch_size, data_parallel_rank, data_parallel_size, pad_token_id, multiple_of)


def _share(
    samples: Sequence[Sample], width: int, rank: int, ranks: int, pad_token_id: int, multiple_of: int
) -> list[Microbatch]:
    """Microbatches of ``width`` samples dealt out to the ranks in turn: those of one rank."""
    return [
        collate(samples[start : start + width], pad_token_id, multiple_of)
        for start in range(rank * width, len(samples), ranks * width)
    ]
