"""Microbatches: tensors of a fixed layout, and which rank gets which.

Without packing a row holds one sample. With packing it holds as many as fit into its positions;
each is a document of its own, which sees nothing of the others.

Shape suffixes: see methods/base.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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
    lengths = [sum(_positions(sample) for sample in row) for row in rows]
    longest = max([1, *lengths])
    shape = len(rows), math.ceil(longest / multiple_of) * multiple_of
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
        with_room = [r for r, left in enumerate(room) if left >= needed]
        if with_room:
            first = with_room[0]
        else:
            first = len(rows)
            rows.append([])
            room.append(row_length)
        rows[first].append(sample)
        room[first] -= needed
    fullest_first = sorted(range(len(rows)), key=lambda r: room[r])
    return [rows[r] for r in fullest_first]


def _split_evenly(rows: list[list[Sample]], count: int) -> list[list[list[Sample]]]:
    """``count`` runs of consecutive rows, of which none is longer than another by more than one row."""
    bounds = [(len(rows) * j // count, len(rows) * (j + 1) // count) for j in range(count)]
    return [rows[start:stop] for start, stop in bounds]


def with_common_shape(microbatches: Sequence[Microbatch], pad_token_id: int) -> list[Microbatch]:
    """The microbatches padded to the most rows and the longest row among them."""
    rows = max(m.tokens_BS.shape[0] for m in microbatches)
    positions = max(m.tokens_BS.shape[1] for m in microbatches)

    def pad(x_BS: Tensor, value: int = 0) -> Tensor:
        missing_rows, missing_positions = rows - x_BS.shape[0], positions - x_BS.shape[1]
        return F.pad(x_BS, (0, missing_positions, 0, missing_rows), value=value)

    padded = []
    for m in microbatches:
        loss_mask_BS = pad(m.loss_mask_BS)
        padded.append(
            Microbatch(
                tokens_BS=pad(m.tokens_BS, pad_token_id),
                labels_BS=pad(m.labels_BS, pad_token_id),
                loss_mask_BS=loss_mask_BS,
                position_ids_BS=pad(m.position_ids_BS),
                token_task_BS=pad(m.token_task_BS),
                document_BS=None if m.document_BS is None else pad(m.document_BS),
                answers_L=_answers(loss_mask_BS),
            )
        )
    return padded


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
        needed = math.ceil(len(rows) / self.micro_batch_size)
        rows_of_microbatches = _split_evenly(rows, needed)
        unit = self.data_parallel_size * self.microbatch_multiple
        wanted = math.ceil(needed / unit) * unit
        for _ in range(wanted - needed):
            row_of_padding: list[Sample] = []  # no samples
            rows_of_microbatches.append([row_of_padding])
        mine = rows_of_microbatches[self.data_parallel_rank :: self.data_parallel_size]
        microbatches = [collate(its_rows, self.pad_token_id, self.multiple_of) for its_rows in mine]
        if self.microbatch_multiple > 1:
            microbatches = with_common_shape(microbatches, self.pad_token_id)
        return microbatches


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
