"""Evaluation: batched scores equal one-by-one ones, answers are extracted, user errors are one line."""

from __future__ import annotations

import json
import math
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import decoders
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from malora_dist.config_sections import TaskConfig
from malora_dist.data.formats import load_examples
from malora_dist.data.segments import Example, Segment
from malora_dist.errors import CheckpointError, ConfigError
from malora_dist.hf.evaluate import evaluate, extract_answer, load_adapter, load_base
from tests.hf_models import STOCK, adapter_config, randomise

SCRIPT = Path(__file__).resolve().parents[1] / "tools" / "evaluate.py"
NEW_TOKENS = 6
PROMPTS = ("reverse abc:", "what is 12+30?", "a", "sum of 1 and 2 and 3 and 4:", "x=")


@pytest.fixture(scope="session")
def model_dir(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with a tokenizer that decodes without spaces between its characters."""
    directory = tmp_path_factory.mktemp("hf") / "model"
    shutil.copytree(llama_dir, directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    tokenizer.save_pretrained(directory)
    return directory


def greedy(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """One prompt, no batch, no padding, no cache: the token of the highest logit, again and again."""
    ids = [*tokenizer(prompt, add_special_tokens=False).input_ids]
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[-NEW_TOKENS:], skip_special_tokens=True).strip()


@pytest.fixture(scope="session")
def data_file(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five prompts; the answers of the first three are what the base generates."""
    model, tokenizer = load_base(model_dir)
    answers = [greedy(model, tokenizer, prompt) for prompt in PROMPTS[:3]] + ["no", "never"]
    file = tmp_path_factory.mktemp("data") / "echo.jsonl"
    rows = [{"prompt": p, "completion": a} for p, a in zip(PROMPTS, answers, strict=True)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture(scope="session")
def adapter_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = get_peft_model(LlamaForCausalLM.from_pretrained(model_dir), adapter_config())
    randomise(model)
    directory = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(directory)
    return directory


def loss_by_transformers(model: Any, tokenizer: PreTrainedTokenizerBase, file: Path) -> tuple[float, int]:
    """(sum of answer losses / number of answer tokens, that number) with transformers' own loss, one by one."""
    total, tokens = 0.0, 0
    for line in file.read_text().splitlines():
        record = json.loads(line)
        prompt, answer = (tokenizer(record[k], add_special_tokens=False).input_ids for k in ("prompt", "completion"))
        answer = [*answer, tokenizer.eos_token_id]
        with torch.no_grad():
            labels = torch.tensor([[-100] * len(prompt) + answer])
            total += len(answer) * model(torch.tensor([prompt + answer]), labels=labels).loss.item()
        tokens += len(answer)
    return total / tokens, tokens


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("adapter", [False, True])
def test_scores_equal_those_of_single_samples(
    batch_size: int, adapter: bool, model_dir: Path, data_file: Path, adapter_dir: Path
) -> None:
    model, tokenizer = load_base(model_dir)
    scored = load_adapter(model, adapter_dir) if adapter else model
    examples = load_examples(TaskConfig(path=str(data_file)))
    score = evaluate(scored, tokenizer, examples, batch_size=batch_size, max_new_tokens=NEW_TOKENS)
    loss, tokens = loss_by_transformers(scored, tokenizer, data_file)
    hits = sum(greedy(scored, tokenizer, e.prompt) == e.answer.strip() for e in examples)
    assert (score.samples, score.answer_tokens, score.truncated) == (5, tokens, 0)
    assert score.answer_loss == pytest.approx(loss, rel=1e-5)
    assert score.exact_match == hits / 5
    assert adapter or hits == 3


def test_long_prompts_lose_their_start(model_dir: Path) -> None:
    model, tokenizer = load_base(model_dir)  # context 128
    long = Example((Segment("a" * 200, False), Segment("b", True)))
    assert evaluate(model, tokenizer, [long], max_new_tokens=NEW_TOKENS).truncated == 1
    with pytest.raises(ConfigError, match="--max-new-tokens=128"):
        evaluate(model, tokenizer, [long], max_new_tokens=128)


GSM8K = Example((Segment("q", False), Segment(" 7*8=56\n#### 14", True)), reference="14")
BOOLQ = Example((Segment("q", False), Segment("the correct answer is true", True)), reference="true")
PLAIN = Example((Segment("q", False), Segment("#### heading\ntext", True)))


@pytest.mark.parametrize(
    ("example", "generated", "extracted"),
    [
        (GSM8K, "something else\n#### 14", "14"),
        (GSM8K, "#### 14\nQuestion: more?\n#### 15", "14"),
        (GSM8K, "it is 14 of course", "it is 14 of course"),
        (GSM8K, "####", ""),
        (BOOLQ, "the correct answer is false", "false"),
        (BOOLQ, " true ", "true"),
        (PLAIN, " #### heading\ntext\n", "#### heading\ntext"),
    ],
)
def test_extracted_answer(example: Example, generated: str, extracted: str) -> None:
    assert extract_answer(generated, example) == extracted


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_command_compares_before_and_after(
    model_dir: Path, data_file: Path, adapter_dir: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("COLUMNS", "120")
    run(
        monkeypatch, "--hf-model", model_dir, "--adapter", adapter_dir, "--data", data_file, "--max-samples", 3,
        "--max-new-tokens", NEW_TOKENS, "--compare", "--json", tmp_path / "out.json",
    )  # fmt: skip
    output = capsys.readouterr().out
    assert "exact match before" in output
    assert "100.0%" in output
    scores = json.loads((tmp_path / "out.json").read_text())["tasks"]["echo"]
    assert scores["before"]["exact_match"] == 1.0
    assert scores["before"]["samples"] == 3
    assert scores["after"]["answer_loss"] != scores["before"]["answer_loss"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--hf-model", "{tmp}"], "is not a Hugging Face model"),
        (["--hf-model", "{broken}"], "has no model.safetensors"),
        (["--adapter", "{model}"], "is not a PEFT adapter"),
        (["--data", "{empty}"], "holds no records"),
        (["--compare"], "needs|compares an adapter"),
        (["--json", "{tmp}/no/such/out.json"], "no existing directory"),
    ],
)
def test_user_errors_are_one_line(
    wrong: list[str], message: str, model_dir: Path, data_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken").mkdir()
    shutil.copy(model_dir / "config.json", tmp_path / "broken")
    places = {"tmp": tmp_path, "broken": tmp_path / "broken", "model": model_dir, "empty": tmp_path / "empty.jsonl"}
    options = {"--hf-model": str(model_dir), "--data": str(data_file)}
    option, *value = [part.format_map(places) for part in wrong]
    arguments = [part for key, v in options.items() if key != option for part in (key, v)]
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *arguments, option, *value)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2
    assert error.startswith("error: ")
    assert any(part in error for part in message.split("|"))


@pytest.mark.parametrize("kind", ["malora", "hydralora", "lora", "dora"])
@pytest.mark.parametrize("change", [{"hidden_size": 16}, {"num_hidden_layers": 3}, {"num_hidden_layers": 1}])
def test_adapter_of_another_base_is_refused(kind: str, change: dict[str, int], model_dir: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    stock = LoraConfig(target_modules=["q_proj"], use_dora=kind == "dora", task_type="CAUSAL_LM")
    config = stock if kind in STOCK else adapter_config(kind)
    get_peft_model(base, config).save_pretrained(tmp_path)
    other = LlamaForCausalLM(type(base.config)(**base.config.to_dict() | change | {"head_dim": 8}))
    with pytest.raises(CheckpointError, match="trained on another base"):
        load_adapter(other, tmp_path)


def test_a_real_model_writes_stories(shared: Path, tmp_path: Path) -> None:
    """Batched with padding, a real model answers as it does alone; a DoRA saved by stock PEFT loads."""
    model, tokenizer = load_base(shared / "models" / "stories260k")
    starts = ["Once upon a time", "Tom and Lily", "The cat"]
    ids = [tokenizer(start, return_tensors="pt") for start in starts]
    with torch.no_grad():
        texts = [model.generate(**i, max_new_tokens=12, do_sample=False)[0, i.input_ids.shape[1] :] for i in ids]
    answers = [tokenizer.decode(text, skip_special_tokens=True) for text in texts]
    examples = [Example((Segment(s, False), Segment(a, True))) for s, a in zip(starts, answers, strict=True)]
    dora = get_peft_model(model, LoraConfig(target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM"))
    dora.save_pretrained(tmp_path)
    scored = load_adapter(dora.unload(), tmp_path)
    assert isinstance(scored, PeftModel)
    score = evaluate(scored, tokenizer, examples, batch_size=3, max_new_tokens=12)
    assert score.exact_match == 1.0
    assert 0 < score.answer_loss < math.log(512)  # of a vocabulary of 512
