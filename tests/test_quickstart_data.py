"""The quickstart's tasks, its base's ingredients, and the guards of its scripts."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from malora_dist.config_file import load_config
from malora_dist.config_sections import TaskConfig
from malora_dist.data.formats import load_examples
from malora_dist.data.synthetic import BASE_SKILLS, TASKS, base_samples, task_samples, write_tasks
from malora_dist.data.tokenization import encode_example
from malora_dist.errors import DataError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def quickstart() -> ModuleType:
    """tools/make_quickstart.py as a module."""
    spec = importlib.util.spec_from_file_location("make_quickstart", ROOT / "tools" / "make_quickstart.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("task", "given", "answer"),
    [
        ("reverse", "lomati", "itamol"),
        ("sort", "dbca", "abcd"),
        ("add", "24+53", "77"),
        ("plural", "city", "cities"),
        ("plural", "leaf", "leaves"),
        ("plural", "fish", "fishes"),
        ("plural", "book", "books"),
        ("cipher", "axyz", "dabc"),
        ("vowels", "lomati", "oai"),
    ],
)
def test_each_task_has_the_right_answer(task: str, given: str, answer: str) -> None:
    assert TASKS[task].solve(given) == answer


def test_additions_need_no_carry() -> None:
    for sample in task_samples("add", 1500, seed=0):
        first, second = sample.prompt.removeprefix("Add: ").strip().split("+")
        assert sample.completion == str(int(first) + int(second))
        assert len(sample.completion) == 2
        assert int(first[1]) + int(second[1]) < 10


def test_no_instruction_of_a_task_is_in_the_base() -> None:
    assert not {task.instruction for task in TASKS.values()} & {skill.instruction for skill in BASE_SKILLS}


def test_the_same_seed_gives_the_same_text_and_another_seed_another() -> None:
    assert base_samples(200, seed=1) == base_samples(200, seed=1) != base_samples(200, seed=2)
    assert task_samples("sort", 50, seed=1) == task_samples("sort", 50, seed=1) != task_samples("sort", 50, seed=2)


def test_written_tasks_load_and_validation_is_held_out(tmp_path: Path) -> None:
    files = write_tasks(tmp_path, seed=0)
    assert [file.stem for file in files] == list(TASKS)
    for file in files:
        train = load_examples(TaskConfig(path=str(file)))
        validation = load_examples(TaskConfig(path=str(tmp_path / "validation" / file.name)))
        assert (len(train), len(validation)) == (1500, 100)
        assert len({example.prompt for example in [*train, *validation]}) == 1600


def test_the_config_names_every_task_and_its_seq_length_holds_every_sample(quickstart: ModuleType) -> None:
    config = load_config(ROOT / "configs" / "quickstart.yaml")
    config.validate(world_size=2)
    assert [task.label for task in config.data] == list(TASKS)
    for task in config.data:
        assert task.path == f"runs/quickstart/data/train/{task.label}.jsonl"
        assert task.validation_path == f"runs/quickstart/data/validation/{task.label}.jsonl"
    rng = random.Random(0)
    samples = [skill.sample(rng) for skill in (*TASKS.values(), *BASE_SKILLS) for _ in range(200)]
    ids, _ = quickstart.encode(samples, quickstart.build_tokenizer(256))
    assert ids.shape[1] <= config.seq_length


def test_base_is_a_hugging_face_model_that_learns_and_is_reproducible(quickstart: ModuleType, tmp_path: Path) -> None:
    recipe = quickstart.Recipe(
        seed=3, steps=30, batch_size=16, warmup_steps=5, hidden_size=32, intermediate_size=48, num_layers=1
    )
    for name in ("one", "two"):
        quickstart.make_base(tmp_path / name, recipe)
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "two"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    ids, labels = quickstart.encode(base_samples(64, seed=9), tokenizer)
    start = quickstart.build_model(recipe, tokenizer)
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            for model in (start, one)
        ]
    assert losses[1] < losses[0] - 1.0
    assert one.config.vocab_size == len(tokenizer) == 260
    assert one.config.num_key_value_heads < one.config.num_attention_heads


def test_base_training_sees_what_the_trainer_would_feed(quickstart: ModuleType, tmp_path: Path) -> None:
    quickstart.build_tokenizer(256).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    sample = task_samples("reverse", 1, seed=0)[0]
    file = tmp_path / "one.jsonl"
    file.write_text(json.dumps(vars(sample)) + "\n")
    expected = encode_example(load_examples(TaskConfig(path=str(file)))[0], tokenizer)
    ids, labels = quickstart.encode([sample], tokenizer)
    assert ids[0].tolist() == expected.token_ids
    assert (labels[0] != -100).tolist() == expected.trained
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == sample.prompt + sample.completion
    assert tokenizer("").input_ids == [tokenizer.bos_token_id]
    text = "naïve — 東京 🙂\t\n"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_a_base_of_the_same_recipe_is_kept_and_any_other_replaced(
    quickstart: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []
    monkeypatch.setattr(quickstart, "train", lambda model, tokenizer, recipe: trained.append(recipe.seed))
    small = {"steps": 1, "hidden_size": 32, "intermediate_size": 48, "num_layers": 1}
    for seed in (1, 1, 2):
        quickstart.make_base(tmp_path / "base", quickstart.Recipe(seed=seed, **small))
    assert trained == [1, 2]
    (tmp_path / "base" / "recipe.json").unlink()  # as an interrupted run leaves it
    quickstart.make_base(tmp_path / "base", quickstart.Recipe(seed=2, **small))
    assert trained == [1, 2, 2]


def test_split_files_holds_out_a_fifth_and_loses_nothing(quickstart: ModuleType, tmp_path: Path) -> None:
    records = [{"prompt": f"{i}", "completion": f"é{i}"} for i in range(10)]
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(records))
    (train,) = quickstart.split_files([file], tmp_path / "data", seed=0)
    split = {
        name: [json.loads(line) for line in (tmp_path / "data" / name / "mine.jsonl").read_text().splitlines()]
        for name in ("train", "validation")
    }
    assert train == tmp_path / "data" / "train" / "mine.jsonl"
    assert (len(split["train"]), len(split["validation"])) == (8, 2)
    assert sorted([*split["train"], *split["validation"]], key=lambda record: int(record["prompt"])) == records


def test_split_files_refuses_two_files_of_one_name_and_a_single_record(quickstart: ModuleType, tmp_path: Path) -> None:
    record = json.dumps({"prompt": "p", "completion": "c"})
    for name, lines in (("a", 5), ("b", 5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jsonl").write_text(f"{record}\n" * lines)
    single = tmp_path / "single.jsonl"
    single.write_text(record)
    with pytest.raises(DataError, match=r"b/x\.jsonl: another file is named x too"):
        quickstart.split_files([tmp_path / "a" / "x.jsonl", tmp_path / "b" / "x.jsonl"], tmp_path / "out", seed=0)
    with pytest.raises(DataError, match=r"single\.jsonl: has one record"):
        quickstart.split_files([single], tmp_path / "out", seed=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hf-model", "/nowhere"], "--hf-model '/nowhere': is not a Hugging Face model"),
        (["--data", "/nowhere.jsonl"], "--data '/nowhere.jsonl': no such file"),
        (["--data", __file__], "--data needs --hf-model DIR too"),
        (["--hf-modle"], "'--hf-modle' is not an option"),
    ],
)
def test_quickstart_refuses_wrong_arguments_in_one_line_before_installing(arguments: list[str], message: str) -> None:
    result = subprocess.run(
        ["bash", str(ROOT / "launch" / "quickstart.sh"), *arguments],
        capture_output=True, text=True, timeout=300, env={"PATH": os.environ["PATH"], "PYTHON": "/nowhere/python"},
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {message}")
    assert result.stderr.count("\n") == 1
    assert ".venv" not in result.stdout


def test_set_up_refuses_an_unsupported_python_in_one_line(tmp_path: Path) -> None:
    old = tmp_path / "python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.1 && exit\nexit 1\n')
    old.chmod(0o755)
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "setup_env.sh").write_text((ROOT / "launch" / "setup_env.sh").read_text())
    result = subprocess.run(
        ["bash", "-c", "set -euo pipefail; . launch/setup_env.sh; setup_env"],
        capture_output=True, text=True, timeout=300, cwd=tmp_path, env={"PATH": "/usr/bin:/bin", "PYTHON": str(old)},
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr == (
        f"error: no Python 3.11 or 3.12 among {old} ({old} is Python 3.8.1); set PYTHON=/path/to/python3.12\n"
    )
