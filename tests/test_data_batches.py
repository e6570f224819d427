"""The order of samples, and the microbatches cut from it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from malora_dist.data.batches import BatchLayout, Microbatch, collate, train_microbatches, validation_microbatches
from malora_dist.data.dataset import TaskDataset
from malora_dist.data.schedule import SampleSchedule, keyed_permutation
from malora_dist.data.tokenization import TokenizedExample

SIZES, WEIGHTS = [70, 5, 1, 900], [1.0, 0.5, 0.001, 2.7]


def schedule(seed: int = 7) -> SampleSchedule:
    return SampleSchedule(SIZES, WEIGHTS, seed)


# --- order -----------------------------------------------------------------------------------


def test_the_order_does_not_depend_on_how_it_is_asked_for() -> None:
    whole = schedule().samples(0, 5000)
    assert len(whole) == 5000
    chunks = schedule()
    assert [s for start in range(0, 5000, 7) for s in chunks.samples(start, min(7, 5000 - start))] == whole
    for start in (0, 1, 1023, 1024, 2500, 4999):
        assert schedule().samples(start, 5000 - start) == whole[start:]  # resumed in another process
        assert chunks.samples(start, 1) == whole[start : start + 1]  # asked out of order


def test_the_order_is_the_seed_s() -> None:
    assert schedule(7).samples(0, 50) == schedule(7).samples(0, 50)
    assert schedule(7).samples(0, 50) != schedule(8).samples(0, 50)
    blocks = [[task for task, _ in SampleSchedule([9, 9], [1, 1], seed).samples(0, 2048)] for seed in (7, 8)]
    assert blocks[0] != blocks[1]  # the tasks' order too
    assert blocks[0][:1024] != blocks[0][1024:]  # in every block anew
    # written down, so that a checkpoint of today resumes tomorrow
    assert SampleSchedule([5], [1.0], 3).samples(0, 5) == [(0, 3), (0, 2), (0, 1), (0, 4), (0, 0)]


def test_every_epoch_has_every_sample_once_in_a_fresh_order() -> None:
    samples = schedule().samples(0, 20_000)
    for task, size in enumerate(SIZES):
        drawn = [index for t, index in samples if t == task]
        epochs = [drawn[i : i + size] for i in range(0, len(drawn) - size + 1, size)]
        assert epochs
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert size < 70 or len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_the_mixture_follows_the_weights() -> None:
    samples = schedule().samples(0, 20_000)
    counts, total = Counter(task for task, _ in samples), sum(WEIGHTS)
    for task, weight in enumerate(WEIGHTS):
        assert abs(counts[task] - 20_000 * weight / total) < 60  # less than a block's spread
    near = Counter(task for task, _ in samples[:200])
    assert near[3] / 200 == pytest.approx(2.7 / total, abs=0.1)  # mixed within a block, too


def test_a_late_position_needs_no_history(monkeypatch: pytest.MonkeyPatch) -> None:
    late = 10**7
    expected = schedule().samples(late - 3000, 3008)[3000:]
    drawn = []

    def counting(size: int, *key: object) -> np.ndarray:
        drawn.append(key)
        return keyed_permutation(size, *key)

    monkeypatch.setattr("malora_dist.data.schedule.keyed_permutation", counting)
    assert schedule().samples(late, 8) == expected
    assert len(drawn) <= 2 + 8  # two blocks, and an epoch per sample at worst


@pytest.mark.parametrize(
    ("sizes", "weights"), [([], []), ([1], [1.0, 1.0]), ([0], [1.0]), ([1], [0.0]), ([1], [float("nan")])]
)
def test_schedules_that_cannot_be(sizes: list[int], weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights"):
        SampleSchedule(sizes, weights, 0)


# --- microbatches ----------------------------------------------------------------------------


def sample(*token_ids: int, prompt: int) -> TokenizedExample:
    return TokenizedExample(list(token_ids), [i >= prompt for i in range(len(token_ids))])


def test_collate() -> None:
    rows = [[(0, sample(1, 5, 6, 7, 2, prompt=3))], [(2, sample(1, 8, 2, prompt=1))]]
    batch = collate(rows, pad_token_id=9, multiple_of=3)
    assert batch.tokens_BS.tolist() == [[1, 5, 6, 7, 9, 9], [1, 8, 9, 9, 9, 9]]
    assert batch.labels_BS.tolist() == [[5, 6, 7, 2, 9, 9], [8, 2, 9, 9, 9, 9]]
    assert batch.loss_mask_BS.tolist() == [[0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]
    assert batch.position_ids_BS.tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    assert batch.token_task_BS.tolist() == [[1, 1, 1, 1, 0, 0], [3, 3, 0, 0, 0, 0]]
    assert batch.document_BS is None
    assert batch.answers_L.tolist() == [1, 3, 4, 6]  # position by position, both rows of each
    assert batch.loss_mask_BS.dtype is torch.float32
    for tensor in (batch.tokens_BS, batch.labels_BS, batch.position_ids_BS, batch.token_task_BS):
        assert tensor.dtype is torch.int64


def tasks() -> list[TaskDataset]:
    """Two tasks whose tokens tell task and index: token 100 * (task + 1) + index."""
    made = []
    for task, size in enumerate((11, 5)):
        rows = [sample(1, *[100 * (task + 1) + i] * (1 + i % 3), 2, prompt=1) for i in range(size)]
        made.append(TaskDataset(f"t{task}", 1.0, rows, rows, 0, 0))
    return made


def rows_of(batches: list[Microbatch]) -> list[tuple[int, ...]]:
    """(task mark, first sample token) of each row that is no padding."""
    return [
        (int(marks[0]), int(labels[0]))
        for batch in batches
        for marks, labels in zip(batch.token_task_BS, batch.labels_BS, strict=True)
        if marks.any()
    ]


def same(one: Microbatch, other: Microbatch) -> bool:
    assert one.document_BS is None
    assert other.document_BS is None
    names = ("tokens_BS", "labels_BS", "loss_mask_BS", "position_ids_BS", "token_task_BS")
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


def train(consumed: int, rank: int, ranks: int) -> list[Microbatch]:
    layout = BatchLayout(2, pad_token_id=0, data_parallel_rank=rank, data_parallel_size=ranks, multiple_of=2)
    return train_microbatches(tasks(), SampleSchedule([11, 5], [1.0, 1.0], 3), consumed, 8, layout)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_step_does_not_depend_on_data_parallelism(ranks: int) -> None:
    reference = train(16, 0, 1)
    assert len(reference) == 4
    for rank in range(ranks):
        mine = train(16, rank, ranks)
        assert len(mine) == 4 // ranks
        assert all(same(a, b) for a, b in zip(mine, reference[rank::ranks], strict=True))


def test_steps_follow_the_schedule() -> None:
    order = SampleSchedule([11, 5], [1.0, 1.0], 3).samples(0, 32)
    found = [row for step in range(4) for row in rows_of(train(8 * step, 0, 1))]
    assert found == [(task + 1, 100 * (task + 1) + index) for task, index in order]
    with pytest.raises(ValueError, match=r"global_batch_size=8 is no multiple of micro_batch_size \* DP .* = 6"):
        train(0, 0, 3)


def validate(task: int, eval_iters: int, rank: int, ranks: int) -> list[Microbatch]:
    layout = BatchLayout(2, pad_token_id=0, data_parallel_rank=rank, data_parallel_size=ranks, multiple_of=4)
    return validation_microbatches(tasks()[task], task, eval_iters, layout)


@pytest.mark.parametrize(("eval_iters", "expected"), [(100, 5), (2, 4), (0, 0)])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_validation_is_the_same_on_any_number_of_ranks(ranks: int, eval_iters: int, expected: int) -> None:
    shares = [validate(1, eval_iters, rank, ranks) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1  # no rank waits for another
    rows = [row for share in shares for row in rows_of(share)]
    assert sorted(rows) == [(2, 200 + i) for i in range(expected)]
    answer_tokens = sum(batch.loss_mask_BS.sum() for share in shares for batch in share)
    assert answer_tokens == sum(batch.loss_mask_BS.sum() for batch in validate(1, eval_iters, 0, 1))
    for batch in (batch for share in shares for batch in share):
        assert batch.tokens_BS.shape[0] in (1, 2)
        assert batch.tokens_BS.shape[1] % 4 == 0
        assert batch.tokens_BS.shape[1] > 0


def test_a_rank_without_samples_gets_padding_only() -> None:
    (idle,) = validate(1, 1, 3, 4)
    assert idle.tokens_BS.shape == (1, 4)
    assert not idle.loss_mask_BS.any()
    assert not idle.token_task_BS.any()


def test_interleaved_stages_get_microbatches_of_one_shape() -> None:
    """Padded like everything else: what is added counts nowhere."""
    samples = [(0, TokenizedExample([1] * n, [False] + [True] * (n - 1))) for n in (3, 9, 4, 2, 7)]
    plain = BatchLayout(2, pad_token_id=5).microbatches(samples)
    alike = BatchLayout(2, pad_token_id=5, microbatch_multiple=2).microbatches(samples)
    assert {m.tokens_BS.shape for m in alike} == {(2, 8)}
    assert len(alike) == 4
    for before, after in zip(plain, alike, strict=False):
        b, s = before.tokens_BS.shape
        assert torch.equal(after.tokens_BS[:b, :s], before.tokens_BS)
        assert after.loss_mask_BS.sum() == before.loss_mask_BS.sum()
        assert (after.token_task_BS > 0).sum() == (before.token_task_BS > 0).sum()
        assert set(after.tokens_BS[:, s:].flatten().tolist()) <= {5}
