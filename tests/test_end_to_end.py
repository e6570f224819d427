"""Real model, real data, the whole way: convert, train on two processes, export, reload with PEFT, compare logits.

float32 on both sides; logits agree within 1e-4 (two implementations of the same Llama).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import malora_dist.hf  # noqa: F401  registers the tuner
from malora_dist.checkpoint.convert import import_hf, read_adapter_weights
from malora_dist.hf.export import write_peft_adapter
from tests.hf_models import TUNED
from tests.workers import WorkerPool

FILES = {
    "math": "data/math/gsm8k_test.jsonl",
    "code": "data/code/code_alpaca_2k.json",
    "commonsense": "data/commonsense/arc_challenge_test.json",
}
SAMPLES = 160


@pytest.fixture(scope="module")
def stories(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pretrained Llama converted, with the first records of one file per domain beside it."""
    folder = tmp_path_factory.mktemp("stories")
    import_hf(shared / "models" / "stories260k", folder / "megatron")
    for name, file in FILES.items():
        text = (shared / file).read_text(encoding="utf-8")
        records = [json.loads(line) for line in text.splitlines()] if file.endswith("l") else json.loads(text)
        lines = "".join(json.dumps(record) + "\n" for record in records[:SAMPLES])
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder


@pytest.mark.parametrize("method", ["dora", "hydralora", "malora"])
def test_every_task_improves_and_hugging_face_agrees(
    method: str, stories: Path, shared: Path, workers: WorkerPool, tmp_path: Path
) -> None:
    base = shared / "models" / "stories260k"
    expert_parallel = 2 if method in TUNED else 1
    tokenizer = AutoTokenizer.from_pretrained(base)
    token_ids = torch.tensor([tokenizer("Once upon a time, there was a little girl named Lily.").input_ids])
    results = workers.run(
        "train_end_to_end",
        2,
        token_ids=token_ids,
        overrides=[
            f"pretrained_checkpoint={stories / 'megatron'}", f"save={tmp_path / 'adapter'}", f"method={method}",
            "data=[" + ",".join(f"{{path: {stories / name}.jsonl}}" for name in FILES) + "]",
            f"expert_model_parallel_size={expert_parallel}", "device=cpu", "seq_length=160", "validation_samples=16",
            "micro_batch_size=4", "global_batch_size=8", "train_iters=15", "eval_interval=0", "eval_iters=4",
            "lr=5e-3", "lr_warmup_iters=2",
        ],
    )  # fmt: skip
    for task in FILES:
        assert results[0]["after"][task] < results[0]["before"][task] - 0.05, task
    torch.testing.assert_close(results[0]["logits"], results[1]["logits"], atol=1e-6, rtol=0)

    exported = tmp_path / "exported"
    weights = read_adapter_weights(tmp_path / "adapter")
    write_peft_adapter(
        exported, weights.spec, weights.tensors, weights.base_model_name_or_path, weights.base_fingerprint
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        untrained = model(token_ids).logits
        model = PeftModel.from_pretrained(model, exported).eval()
        logits = model(token_ids).logits
    assert (logits - untrained).abs().max() > 0.1
    torch.testing.assert_close(logits, results[0]["logits"], atol=1e-4, rtol=0)
    text = tokenizer.decode(model.generate(input_ids=token_ids, max_new_tokens=5, do_sample=False)[0])
    assert "Lily" in text
