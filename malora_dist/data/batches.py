"""Microbatches: tensors of a fixed layout, and which rank gets which.

Without packing a row holds one sample. With packing it holds as many as fit into its positions;
each is a document of its own, which sees nothing of the others.

Shape suffixes: B rows of a microbatch, S positions, L positions with a loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from malora_dist.data.dataset import TaskDataset
from malora_dist.data.schedule import SampleSchedule
from malora_dist.data.tokenization import TokenizedExample

#: (task index, sample)
Sample = tuple[int, TokenizedExample]


@dataclass(frozen=True)
class Microbatch:
    """One forward pass, padded on the right. Causal attention needs no padding mask.

    A sample of n tokens takes n - 1 positions: its last token is only a label.

    Attributes:
        tokens_BS: int64 inputs.
        labels_BS: int64, the next token; the pad token on padding.
        loss_mask_BS: float32, 1 where the label is a trained token, EOS included.
        position_ids_BS: int64, from 0 in each document; padding counts on.
        token_task_BS: int64, 0 on padding, task index + 1 on real tokens.
        document_BS: int64, 0 on padding, from 1 the number of the document in its row; None: no row has two.
        answers_L: int64, the positions with a loss, counted along [S, B] (position * B + row), ascending.
    """

    tokens_BS: Tensor
    labels_BS: Tensor
    loss_mask_BS: Tensor
    position_ids_BS: Tensor
    token_task_BS: Tensor
    document_BS: Tensor | None
    answers_L: Tensor


def _positions(sample: Sample) -> int:
    """Positions a sample takes in a row."""
    return max(0, len(sample[1].token_ids) - 1)


def collate(rows: Sequence[Sequence[Sample]], pad_token_id: int, multiple_of: int = 1) -> Microbatch:
    """One microbatch of the rows, S the longest rounded up to ``multiple_of``; a row without samples is padding."""
    longest = max([1, *(sum(map(_positions, row)) for row in rows)])
    shape = len(rows), -(-longest // multiple_of) * multiple_of
    tokens_BS = torch.full(shape, pad_token_id)
    labels_BS = torch.full(shape, pad_token_id)
    loss_mask_BS = torch.zeros(shape)
    position_ids_BS = torch.arange(shape[1]).repeat(shape[0], 1)
    token_task_BS = torch.zeros(shape, dtype=torch.int64)
    document_BS = torch.zeros(shape, dtype=torch.int64)
    for r, row in enumerate(rows):
        start = 0
        for document, (task, sample) in enumerate(row, start=1):
            here = slice(start, start + _positions((task, sample)))
            ids = torch.tensor(sample.token_ids, dtype=torch.int64)
            tokens_BS[r, here] = ids[:-1]
            labels_BS[r, here] = ids[1:]
            loss_mask_BS[r, here] = torch.tensor(sample.trained[1:], dtype=torch.float32)
            position_ids_BS[r, start:] = torch.arange(shape[1] - start)
            token_task_BS[r, here] = task + 1
            document_BS[r, here] = document
            start = here.stop
    is_packed = any(len(row) > 1 for row in rows)
    return Microbatch(
        tokens_BS,
        labels_BS,
        loss_mask_BS,
        position_ids_BS,
        token_task_BS,
        document_BS if is_packed else None,
        _answers(loss_mask_BS),
    )


def _answers(loss_mask_BS: Tensor) -> Tensor:
    """``Microbatch.answers_L``. Found here, on the host, since on a device it would have to be waited for."""
    return loss_mask_BS.t().flatten().nonzero().flatten()


def pack(samples: Sequence[Sample], row_length: int) -> list[list[Sample]]:
    """Rows of samples of at most ``row_length`` positions together, the fullest row first.

    First-fit decreasing: from the longest sample to the shortest, each goes to the first row that
    has room for it. Of equally long samples, and equally full rows, the earlier stays first.

    Raises:
        ValueError: a sample is longer than a row.
    """
    rows: list[list[Sample]] = []
    room: list[int] = []
    for sample in sorted(samples, key=_positions, reverse=True):
        needed = _positions(sample)
        if needed > row_length:
            raise ValueError(f"a sample takes {needed} positions, row_length={row_length}")
        first = next((r for r, left in enumerate(room) if left >= needed), len(rows))
        if first == len(rows):
            rows.append([])
            room.append(row_length)
        rows[first].append(sample)
        room[first] -= needed
    return [rows[r] for r in sorted(range(len(rows)), key=room.__getitem__)]


def with_common_shape(microbatches: Sequence[Microbatch], pad_token_id: int) -> list[Microbatch]:
    """The microbatches padded to the most rows and the longest row among them."""
    rows, positions = (max(m.tokens_BS.shape[axis] for m in microbatches) for axis in (0, 1))

    def pad(m: Microbatch) -> Microbatch:
        b, s = m.tokens_BS.shape
        padded: dict[str, Any] = {
            field.name: F.pad(
                getattr(m, field.name),
                (0, positions - s, 0, rows - b),
                value=pad_token_id if field.name in ("tokens_BS", "labels_BS") else 0,
            )
            for field in dataclasses.fields(m)
            if field.name != "answers_L" and getattr(m, field.name) is not None
        }
        padded.setdefault("document_BS", None)
        return Microbatch(**padded, answers_L=_answers(padded["loss_mask_BS"]))

    return [pad(m) for m in microbatches]


@dataclass(frozen=True)
class BatchLayout:
    """How samples become the microbatches of one rank.

    What is in a step, and what shares a row or a microbatch, depends neither on DP nor on
    ``microbatch_multiple``: microbatch j goes to rank j mod DP, and microbatches of padding,
    which no loss counts, make up what is missing at the end.

    Attributes:
        micro_batch_size: most rows of a microbatch.
        multiple_of: S is a multiple of it.
        row_length: positions of a row that samples are packed into; None: one sample a row.
        microbatch_multiple: every rank gets a multiple of so many microbatches; above 1, which
            interleaved pipelines want, the microbatches of a step also get one shape.
    """

    micro_batch_size: int
    pad_token_id: int
    data_parallel_rank: int = 0
    data_parallel_size: int = 1
    multiple_of: int = 1
    row_length: int | None = None
    microbatch_multiple: int = 1

    def microbatches(self, samples: Sequence[Sample]) -> list[Microbatch]:
        """This rank's microbatches of samples that all ranks share: as few as hold them, their rows alike in number.

        Raises:
            ValueError: a sample is longer than a row.
        """
        rows = [[sample] for sample in samples] if self.row_length is None else pack(samples, self.row_length)
        count = -(-len(rows) // self.micro_batch_size)
        parts = [rows[len(rows) * j // count : len(rows) * (j + 1) // count] for j in range(count)]
        parts += [[[]]] * (-count % (self.data_parallel_size * self.microbatch_multiple))
        mine = parts[self.data_parallel_rank :: self.data_parallel_size]
        found = [collate(part, self.pad_token_id, self.multiple_of) for part in mine]
        return found if self.microbatch_multiple == 1 else with_common_shape(found, self.pad_token_id)


def train_microbatches(
    tasks: Sequence[TaskDataset],
    schedule: SampleSchedule,
    consumed: int,
    global_batch_size: int,
    layout: BatchLayout,
) -> list[Microbatch]:
    """This rank's microbatches of the optimizer step that follows ``consumed`` samples.

    Raises:
        ValueError: without packing, global_batch_size leaves a microbatch or a rank with less than another.
    """
    width = layout.micro_batch_size * layout.data_parallel_size * layout.microbatch_multiple
    if layout.row_length is None and global_batch_size % width:
        raise ValueError(
            f"global_batch_size={global_batch_size} is no multiple of micro_batch_size * DP * microbatch_multiple = "
            f"{width}"
        )
    samples = schedule.samples(consumed, global_batch_size)
    return layout.microbatches([(task, tasks[task].train[i]) for task, i in samples])


def validation_microbatches(task: TaskDataset, index: int, eval_iters: int, layout: BatchLayout) -> list[Microbatch]:
    """This rank's share of the first ``eval_iters * micro_batch_size`` samples of a task's validation split.

    Every rank gets the same number of microbatches; their union does not depend on DP.

    Args:
        index: the task's index, for token_task_BS.
    """
    return layout.microbatches([(index, sample) for sample in task.validation[: eval_iters * layout.micro_batch_size]])
