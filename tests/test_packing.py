"""Packing: several samples in a row change the speed and nothing else.

Runs are float32. Rotary positions are relative, so a document gives the same attention anywhere in
a row up to the rounding of its angles; the bars are those of tests/test_parity.py.
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from malora_dist.config_file import load_config
from malora_dist.data.batches import BatchLayout, Microbatch, Sample, collate, pack
from malora_dist.data.tokenization import TokenizedExample
from malora_dist.errors import ConfigError
from malora_dist.methods.initial import initial_parameter
from malora_dist.methods.reference import adapted_forward
from malora_dist.methods.spec import AdapterSpec
from tests.workers import WorkerPool

RTOL = 1e-4


def make_samples(lengths: list[int], rng: random.Random) -> list[Sample]:
    """Samples of so many tokens, of three tasks, trained from a random token on."""
    samples = []
    for length in lengths:
        prompt = rng.randint(0, length)
        ids = [rng.randint(3, 49) for _ in range(length)]
        samples.append((rng.randint(0, 2), TokenizedExample(ids, [i >= prompt for i in range(length)])))
    return samples


def positions(row: list[Sample]) -> int:
    return sum(max(len(sample.token_ids) - 1, 0) for _, sample in row)


# --- rows and microbatches -------------------------------------------------------------------


def test_collate_lays_documents_side_by_side() -> None:
    def sample(*ids: int) -> TokenizedExample:
        return TokenizedExample(list(ids), [i > 1 for i in range(len(ids))])

    batch = collate([[(0, sample(1, 5, 6, 7)), (2, sample(1, 8, 2))], [(1, sample(1, 9))]], 0, multiple_of=4)
    assert batch.tokens_BS.tolist() == [[1, 5, 6, 1, 8, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]]
    assert batch.labels_BS.tolist() == [[5, 6, 7, 8, 2, 0, 0, 0], [9, 0, 0, 0, 0, 0, 0, 0]]
    assert batch.loss_mask_BS.tolist() == [[0, 1, 1, 0, 1, 0, 0, 0], [0] * 8]
    assert batch.position_ids_BS.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7]]
    assert batch.token_task_BS.tolist() == [[1, 1, 1, 3, 3, 0, 0, 0], [2, 0, 0, 0, 0, 0, 0, 0]]
    assert batch.document_BS is not None
    assert batch.document_BS.tolist() == [[1, 1, 1, 2, 2, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]]


def test_the_mask_is_causal_and_within_documents(workers: WorkerPool) -> None:
    documents_BS = torch.tensor([[1, 1, 1, 2, 2, 0]])
    ((mask, other),) = workers.run("jobs_packing:document_masks", 1, documents=[documents_BS, None])
    assert mask.int().tolist() == [[[
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]]]  # fmt: skip
    assert other is None


def documents(microbatches: list[Microbatch]) -> list[tuple[int, list[int], list[bool]]]:
    """(task, tokens, trained flags from the second token on) of everything in the microbatches."""
    found = []
    for batch in microbatches:
        document_BS = (batch.token_task_BS > 0).long() if batch.document_BS is None else batch.document_BS
        assert torch.equal(document_BS > 0, batch.token_task_BS > 0)
        assert not batch.loss_mask_BS[document_BS == 0].any()
        for r in range(document_BS.shape[0]):
            for number in range(1, int(document_BS[r].max()) + 1):
                here = document_BS[r] == number
                (task,) = batch.token_task_BS[r, here].unique().tolist()
                ids = [*batch.tokens_BS[r, here].tolist(), int(batch.labels_BS[r, here][-1])]
                assert batch.labels_BS[r, here].tolist() == ids[1:]
                assert batch.position_ids_BS[r, here].tolist() == list(range(len(ids) - 1))
                found.append((task - 1, ids, batch.loss_mask_BS[r, here].bool().tolist()))
    return found


@pytest.mark.parametrize("seed", range(25))
def test_no_sample_is_lost_or_doubled_on_any_number_of_ranks(seed: int) -> None:
    rng = random.Random(seed)
    row_length, width, multiple_of = rng.randint(4, 40), rng.randint(1, 4), rng.choice((1, 4))
    samples = make_samples([rng.randint(2, row_length + 1) for _ in range(rng.randint(1, 60))], rng)
    alone = BatchLayout(width, 0, multiple_of=multiple_of, row_length=row_length).microbatches(samples)
    expected = sorted((task, s.token_ids, s.trained[1:]) for task, s in samples)
    assert sorted(documents(alone)) == expected
    for batch in alone:
        assert batch.tokens_BS.shape[0] <= width
        assert batch.tokens_BS.shape[1] % multiple_of == 0
        assert batch.tokens_BS.shape[1] < row_length + multiple_of
    for ranks, multiple in ((2, 1), (4, 1), (2, 3)):
        shares = [
            BatchLayout(width, 0, rank, ranks, multiple_of, row_length, multiple).microbatches(samples)
            for rank in range(ranks)
        ]
        assert len({len(share) for share in shares}) == 1  # no rank waits for another
        assert len(shares[0]) % multiple == 0
        dealt = [batch for step in zip(*shares, strict=True) for batch in step]
        for mine, reference in itertools.zip_longest(dealt, alone):
            if reference is None:
                assert not mine.token_task_BS.any()
                assert multiple > 1 or mine.tokens_BS.shape == (1, multiple_of)
                continue
            b, s = reference.tokens_BS.shape
            for a, expected_BS in zip(fields(mine), fields(reference), strict=True):
                assert torch.equal(a[:b, :s], expected_BS)
                assert multiple > 1 or a.shape == (b, s)
            assert mine.token_task_BS.sum() == reference.token_task_BS.sum()
            assert len(mine.answers_L) == mine.loss_mask_BS.sum()
            assert (mine.loss_mask_BS.t().flatten()[mine.answers_L] == 1).all()


def fields(batch: Microbatch) -> list[Tensor]:
    return [tensor for name, tensor in vars(batch).items() if name.endswith("_BS") and tensor is not None]


@pytest.mark.parametrize("seed", range(10))
def test_no_two_rows_would_fit_into_one_and_the_fullest_comes_first(seed: int) -> None:
    rng = random.Random(seed)
    row_length = rng.randint(4, 40)
    rows = pack(make_samples([rng.randint(2, row_length + 1) for _ in range(80)], rng), row_length)
    fills = [positions(row) for row in rows]
    assert fills == sorted(fills, reverse=True)
    assert max(fills) <= row_length
    assert all(a + b > row_length for a, b in itertools.combinations(fills, 2))


def test_rows_are_full_and_microbatches_alike() -> None:
    rng = random.Random(0)
    lengths = [min(2 + int(rng.lognormvariate(4.5, 0.7)), 512) for _ in range(256)]
    samples = make_samples(lengths, rng)
    rows = pack(samples, 512)
    assert len(rows) <= 1 + -(-positions(samples) // 512)
    batches = BatchLayout(4, 0, row_length=512).microbatches(samples)
    assert {batch.tokens_BS.shape[0] for batch in batches} <= {len(rows) // len(batches), len(rows) // len(batches) + 1}
    assert sum(batch.tokens_BS.numel() for batch in batches) < 1.05 * positions(samples)


def test_equals_stay_in_order() -> None:
    samples = make_samples([5] * 6, random.Random(0))
    assert pack(samples, 8) == [samples[0:2], samples[2:4], samples[4:6]]


def test_a_sample_longer_than_a_row_is_an_error() -> None:
    samples = make_samples([4, 10], random.Random(0))
    assert pack(samples, 9) == [[samples[1]], [samples[0]]]
    with pytest.raises(ValueError, match="a sample takes 9 positions, row_length=8"):
        pack(samples, 8)


def test_global_batch_size_need_not_fit_the_microbatches(tmp_path: Path) -> None:
    settings = [f"pretrained_checkpoint={tmp_path}", "data=[{path: a.jsonl}]", "micro_batch_size=2"]
    load_config(None, [*settings, "packing=true", "global_batch_size=7"]).validate(world_size=4)
    with pytest.raises(ConfigError, match="global_batch_size=7: must be a multiple of micro_batch_size=2"):
        load_config(None, [*settings, "global_batch_size=7"]).validate(world_size=4)
    with pytest.raises(ConfigError, match="global_batch_size=0: must be at least 1"):
        load_config(None, [*settings, "packing=true", "global_batch_size=0"]).validate(world_size=4)


def test_a_microbatch_of_padding_adds_nothing_to_the_load_balancing_loss() -> None:
    method = AdapterSpec(num_lora_experts=4, shared_dim=8, aux_loss_coeff=0.1).declared
    params = {name: initial_parameter(method, name, 8, 8, 0, 0, "q_proj") for name in method.parameters}
    params["router"].requires_grad_()
    padding_T = torch.zeros(6, dtype=torch.bool)
    _, aux = adapted_forward(method, params, torch.zeros(6, 8), torch.zeros(8, 8), padding_T)
    aux.backward()
    assert float(aux.detach()) == 0.0
    assert params["router"].grad is not None
    assert not params["router"].grad.any()


# --- the model -------------------------------------------------------------------------------


def settings(base: Path, files: list[Path], *more: str) -> list[str]:
    data = ",".join(f"{{path: {file}}}" for file in files)
    return [
        f"pretrained_checkpoint={base}", f"data=[{data}]", "device=cpu", "seq_length=48", "validation_samples=8",
        "micro_batch_size=2", "global_batch_size=16", "lr=0.01", "weight_decay=0.1", "lr_decay_style=constant",
        "adam_eps=1e-3", "num_lora_experts=4", "topk=2", "lora_rank=4", "shared_dim=6", "aux_loss_coeff=0",
        *more,
    ]  # fmt: skip


def close(name: str, got: Tensor, expected: Tensor, rtol: float = RTOL) -> None:
    """Within ``rtol`` of the tensor's largest entry."""
    error = float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
    assert error < rtol, f"{name}: off by {error:.2e} of its largest entry"


def test_documents_of_a_row_are_as_if_alone(
    workers: WorkerPool, base_dir: Path, llama_dir: Path, task_files: list[Path]
) -> None:
    rng = random.Random(0)
    rows = [make_samples(lengths, rng) for lengths in ([9, 6, 14], [5, 12], [20])]
    others = [list(row) for row in rows]
    others[0][1] = make_samples([6], rng)[0]  # other tokens in the middle of the first row
    alone = [collate([[sample]], 0) for row in rows for sample in row]
    packed, changed = collate(rows, 0, multiple_of=8), collate(others, 0, multiple_of=8)
    overrides = settings(base_dir, task_files)
    (results,) = workers.run(
        "jobs_packing:logits", 1, overrides=overrides, microbatches=[packed, changed, *alone], randomise=True
    )
    assert all(logits.isfinite().all() for logits in results)
    assert packed.document_BS is not None
    expected = iter(results[2:])
    for r, row in enumerate(rows):
        for number in range(1, len(row) + 1):
            here = packed.document_BS[r] == number
            close(f"document {number} of row {r}", results[0][r, here], next(expected)[0], rtol=1e-5)
            is_changed = (r, number) == (0, 2)
            assert torch.equal(results[0][r, here], results[1][r, here]) is not is_changed

    # transformers finds the documents in position_ids
    (base_logits,) = workers.run(
        "jobs_packing:logits", 1, overrides=overrides, microbatches=[packed], randomise=False
    )[0]  # fmt: skip
    model = LlamaForCausalLM.from_pretrained(llama_dir, dtype=torch.float32)
    with torch.no_grad():
        theirs = model(packed.tokens_BS, position_ids=packed.position_ids_BS, use_cache=False).logits
    real = packed.document_BS > 0
    close("logits of transformers", base_logits[real], theirs[real], rtol=1e-5)


def microbatches_per_rank(results: list[dict[str, Any]], step: int) -> list[int]:
    return [len(r["input_grads"][step]) for r in results if r["place"]["pp"] == 0]


def compare(results: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Losses, counts, shards of gradients and parameters; ``expected`` by the same ranks, or whole by one process."""
    references = expected * len(results) if len(expected) == 1 else expected
    for result, reference in zip(results, references, strict=True):
        assert result["losses"] == pytest.approx(reference["losses"], rel=1e-5)
        assert result["grad_norms"] == pytest.approx(reference["grad_norms"], rel=RTOL)
        assert result["counts"] == reference["counts"], "padding is counted, or a sample twice"
        pairs = [
            *zip(result["grads"], reference["grads"], strict=True),
            (result["parameters"], reference["parameters"]),
        ]
        for step, (got, wanted) in enumerate(pairs):
            for key, (where, shape, shard) in got.items():
                there, _, tensor = wanted[key]
                whole = torch.zeros(shape)
                whole[there] = tensor
                close(f"step {step}, {key}", shard, whole[where])


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (1, []),
        (2, ["expert_model_parallel_size=2"]),
        (2, ["pipeline_model_parallel_size=2"]),
        (2, ["tensor_model_parallel_size=2", "sequence_parallel=true"]),
        (2, ["pipeline_model_parallel_size=2", "recompute_granularity=selective", "recompute_modules=[core_attn,mlp]"]),
    ],
    ids=["1", "EP2", "PP2", "TP2", "PP2, recompute"],
)
def test_training_packed_equals_training_not_packed(
    world_size: int, layout: list[str], workers: WorkerPool, base_dir: Path, task_files: list[Path]
) -> None:
    overrides = settings(base_dir, task_files, *layout)
    plain = workers.run("train_and_record", world_size, overrides=overrides, steps=3)
    packed = workers.run("train_and_record", world_size, overrides=[*overrides, "packing=true"], steps=3)
    for step in range(3):
        assert max(microbatches_per_rank(packed, step)) < min(microbatches_per_rank(plain, step)) / 1.5
    compare(packed, plain)


def test_microbatches_of_padding_do_not_dilute_the_load_balancing_loss(
    workers: WorkerPool, base_dir: Path, task_files: list[Path]
) -> None:
    """An odd number of microbatches on two ranks gives one of them padding; the auxiliary loss stays a mean."""
    overrides = settings(
        base_dir, task_files, "packing=true", "aux_loss_coeff=0.1", "micro_batch_size=1", "global_batch_size=6"
    )
    alone = workers.run("train_and_record", 1, overrides=overrides, steps=3)
    assert any(microbatches_per_rank(alone, step)[0] % 2 for step in range(3)), "no rank gets padding: change the sizes"
    both = workers.run("train_and_record", 2, overrides=[*overrides, "expert_model_parallel_size=2"], steps=3)
    compare(both, alone)


def test_losses_by_task_are_the_same(workers: WorkerPool, base_dir: Path, task_files: list[Path]) -> None:
    """In training the samples of both tasks share rows."""
    overrides = settings(base_dir, task_files, "eval_iters=3")
    (plain,) = workers.run("jobs_packing:task_losses", 1, overrides=overrides)
    (packed,) = workers.run("jobs_packing:task_losses", 1, overrides=[*overrides, "packing=true"])
    for split in (0, 1):
        assert set(plain[split]) == {"reverse", "add"}
        assert packed[split] == pytest.approx(plain[split], rel=1e-5)
