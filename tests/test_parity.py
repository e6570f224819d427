"""Training on every layout equals the one-process oracle: losses, gradients, parameters.

All runs are float32. Tolerances: the layouts sum the same float32 numbers in another order; over
the few thousand terms of these tiny models that moves a tensor by some 1e-6 to 1e-5 of its largest
entry. A wrong mark or a lost reduction moves it by factors between 0.2 and 2.2, four orders above
the bar of 1e-4. adam_eps is 1e-3, because Adam with a small epsilon turns the rounding of near-zero
gradients into full steps. Routing is the same only if no token sits on a tie, so every test checks
the margin.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from malora_dist.adapters.spec import METHODS
from malora_dist.checkpoint.convert import import_hf
from malora_dist.config import Config, load_config
from malora_dist.data.batches import Microbatch, train_microbatches
from malora_dist.data.dataset import load_tasks
from malora_dist.data.schedule import SampleSchedule
from tests.conftest import write_llama
from tests.oracle import OracleRun, Record
from tests.workers import WorkerPool

STEPS = 3
RTOL = 1e-4
TIE_MARGIN = 1e-6


def overrides(base: Path, files: list[Path], *more: str) -> list[str]:
    data = ",".join(f"{{path: {file}}}" for file in files)
    return [
        f"pretrained_checkpoint={base}", f"data=[{data}]", "device=cpu", "seq_length=48", "validation_samples=8",
        "micro_batch_size=2", "global_batch_size=16", "lr=0.01", "weight_decay=0.1", "clip_grad=1.0",
        "lr_decay_style=constant", "adam_eps=1e-3",
        "num_lora_experts=4", "topk=2", "lora_rank=4", "shared_dim=6", "aux_loss_coeff=0.1",
        *more,
    ]  # fmt: skip


def global_steps(config: Config, llama_dir: Path, steps: int) -> list[list[Microbatch]]:
    """The microbatches of the global batch of each step, as one process sees them."""
    tokenizer = AutoTokenizer.from_pretrained(llama_dir)
    tasks = load_tasks(config, tokenizer, config.seed)
    schedule = SampleSchedule([len(t.train) for t in tasks], [t.weight for t in config.data], config.seed)
    return [
        train_microbatches(
            tasks,
            schedule,
            i * config.global_batch_size,
            micro_batch_size=config.micro_batch_size,
            global_batch_size=config.global_batch_size,
            data_parallel_rank=0,
            data_parallel_size=1,
            pad_token_id=tokenizer.pad_token_id,
            multiple_of=8,
        )
        for i in range(steps)
    ]


def oracle(settings: list[str], llama_dir: Path, steps: int = STEPS) -> Record:
    config = load_config(None, settings)
    record = OracleRun(llama_dir, config, config.seed).train(global_steps(config, llama_dir, steps), config)
    assert record.smallest_margin > TIE_MARGIN, "a token sits on a routing tie: choose another seed"
    return record


def assemble(results: list[dict[str, Any]], pick: Any) -> dict[str, Tensor]:
    """Full tensors from the shards of all ranks; replicas must be equal bit by bit."""
    full: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    for result in results:
        for key, (where, shape, shard) in pick(result).items():
            tensor = full.setdefault(key, torch.zeros(shape))
            mask = seen.setdefault(key, torch.zeros(shape, dtype=torch.bool))
            already = mask[where]
            assert torch.equal(tensor[where][already], shard[already]), f"{key}: replicas differ"
            tensor[where] = shard
            mask[where] = True
    for key, mask in seen.items():
        assert mask.all(), f"{key}: a part lies on no rank"
    return full


def close(name: str, got: Tensor, expected: Tensor, rtol: float = RTOL) -> None:
    """Within ``rtol`` of the tensor's largest entry."""
    scale = expected.abs().max().clamp(min=1e-6)
    error = float((got - expected).abs().max() / scale)
    assert error < rtol, f"{name}: off by {error:.2e} of its largest entry"


def compare(results: list[dict[str, Any]], expected: Record) -> None:
    for result in results:
        assert result["losses"] == pytest.approx(expected.losses, rel=1e-5)
        assert result["grad_norms"] == pytest.approx(expected.grad_norms, rel=RTOL)
    for step, grads in enumerate(expected.grads):
        got = assemble(results, lambda r, step=step: r["grads"][step])
        assert set(got) == set(grads)
        for key, grad in grads.items():
            close(f"step {step}, gradient of {key}", got[key], grad)
    got = assemble(results, lambda r: r["parameters"])
    assert set(got) == set(expected.parameters)
    for key, parameter in expected.parameters.items():
        close(f"parameter {key}", got[key], parameter)
    compare_input_gradients(results, expected)


def compare_input_gradients(results: list[dict[str, Any]], expected: Record) -> None:
    """Of the embeddings, per step and microbatch; rank r of DP has microbatches r, r + DP, ..."""
    first = [r for r in results if r["place"]["pp"] == 0]
    dp_size = 1 + max(r["place"]["dp"] for r in first)
    for step, grads in enumerate(expected.input_grads):
        for index, grad in enumerate(grads):
            shards = sorted((r for r in first if r["place"]["dp"] == index % dp_size), key=lambda r: r["place"]["tp"])
            got = torch.cat([r["input_grads"][step][index // dp_size] for r in shards]).transpose(0, 1)
            close(f"step {step}, input gradient of microbatch {index}", got, grad)


@pytest.mark.parametrize("topk", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_one_process(
    method: str, topk: int, workers: WorkerPool, base_dir: Path, llama_dir: Path, task_files: list[Path]
) -> None:
    if topk == 1 and method in ("lora", "asymmetric_lora"):
        pytest.skip("no router")
    settings = overrides(base_dir, task_files, f"method={method}", f"topk={topk}")
    compare(workers.run("train_and_record", 1, overrides=settings, steps=STEPS), oracle(settings, llama_dir))


@pytest.mark.parametrize("topk", [1, 2])
@pytest.mark.parametrize("ep", [2, 4])
@pytest.mark.parametrize("method", ["molora", "malora"])
def test_expert_parallel(
    method: str, ep: int, topk: int, workers: WorkerPool, base_dir: Path, llama_dir: Path, task_files: list[Path]
) -> None:
    settings = overrides(base_dir, task_files, f"method={method}", f"topk={topk}", f"expert_model_parallel_size={ep}")
    compare(workers.run("train_and_record", ep, overrides=settings, steps=STEPS), oracle(settings, llama_dir))


def test_expert_parallel_inside_a_larger_data_parallel_group(
    workers: WorkerPool, base_dir: Path, llama_dir: Path, task_files: list[Path]
) -> None:
    settings = overrides(base_dir, task_files, "expert_model_parallel_size=2")
    compare(workers.run("train_and_record", 4, overrides=settings, steps=STEPS), oracle(settings, llama_dir))


@pytest.mark.parametrize("method", ["lora", "asymmetric_lora"])
def test_data_parallel(
    method: str, workers: WorkerPool, base_dir: Path, llama_dir: Path, task_files: list[Path]
) -> None:
    settings = overrides(base_dir, task_files, f"method={method}")
    compare(workers.run("train_and_record", 2, overrides=settings, steps=STEPS), oracle(settings, llama_dir))


@pytest.mark.parametrize("method", METHODS)
def test_tensor_parallel(
    method: str, workers: WorkerPool, base_dir: Path, llama_dir: Path, task_files: list[Path]
) -> None:
    settings = overrides(
        base_dir, task_files, f"method={method}", "tensor_model_parallel_size=2", "sequence_parallel=true"
    )
    compare(workers.run("train_and_record", 2, overrides=settings, steps=STEPS), oracle(settings, llama_dir))


@pytest.mark.parametrize("method", ["lora", "malora"])
def test_pipeline_parallel(
    method: str, workers: WorkerPool, base_dir: Path, llama_dir: Path, task_files: list[Path]
) -> None:
    settings = overrides(base_dir, task_files, f"method={method}", "pipeline_model_parallel_size=2")
    compare(workers.run("train_and_record", 2, overrides=settings, steps=STEPS), oracle(settings, llama_dir))


@pytest.mark.parametrize("method", ["molora", "malora"])
def test_tensor_and_expert_parallel(
    method: str, workers: WorkerPool, base_dir: Path, llama_dir: Path, task_files: list[Path]
) -> None:
    settings = overrides(
        base_dir, task_files, f"method={method}", "tensor_model_parallel_size=2", "sequence_parallel=true",
        "expert_model_parallel_size=2",
    )  # fmt: skip
    compare(workers.run("train_and_record", 4, overrides=settings, steps=STEPS), oracle(settings, llama_dir))


def test_adapters_on_some_projections_only(
    workers: WorkerPool, base_dir: Path, llama_dir: Path, task_files: list[Path]
) -> None:
    """k and v inside the fused qkv, up inside fc1, and fc2: the others get no delta."""
    settings = overrides(
        base_dir, task_files, "target_modules=[k_proj,v_proj,up_proj,linear_fc2]", "expert_model_parallel_size=2"
    )
    compare(workers.run("train_and_record", 2, overrides=settings, steps=1), oracle(settings, llama_dir, steps=1))


def test_tied_embeddings_and_a_padded_vocabulary_over_tensor_and_pipeline_ranks(
    workers: WorkerPool, task_files: list[Path], tmp_path: Path
) -> None:
    """51 tokens on TP=2 are padded to 52; the padding must get no probability."""
    llama = write_llama(tmp_path / "llama", vocab_size=51, tie_word_embeddings=True)
    import_hf(llama, tmp_path / "megatron")
    settings = overrides(
        tmp_path / "megatron", task_files, "tensor_model_parallel_size=2", "sequence_parallel=true",
        "pipeline_model_parallel_size=2",
    )  # fmt: skip
    compare(workers.run("train_and_record", 4, overrides=settings, steps=2), oracle(settings, llama, steps=2))
