"""Tasks from a config: splits, counts, errors."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from malora_dist.config_sections import DataConfig, TaskConfig
from malora_dist.data.dataset import TaskDataset, data_fingerprints, data_paths, load_tasks
from malora_dist.data.tokenization import TokenizedExample
from malora_dist.errors import ConfigError, DataError
from tests.test_data_text import letter_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return letter_tokenizer()


def write(path: Path, count: int, answer: str = "x", prefix: str = "p") -> str:
    """A file of ``count`` different samples."""
    records = [{"prompt": f"{prefix}{i:03}", "completion": answer} for i in range(count)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def load(
    tokenizer: PreTrainedTokenizerFast, *tasks: TaskConfig, seed: int = 1, **settings: object
) -> list[TaskDataset]:
    return load_tasks(DataConfig(data=list(tasks), **settings), tokenizer, seed)


def lines(samples: list[TokenizedExample]) -> list[int]:
    return [int(sample.source.rpartition(":")[2]) for sample in samples]


def test_held_out_samples(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "a.jsonl", 50)
    a, b = load(tokenizer, TaskConfig(path=path), TaskConfig(path=path, name="b", weight=2.0), validation_samples=7)
    assert (a.name, a.weight, b.name, b.weight) == ("a", 1.0, "b", 2.0)
    assert len(a.validation) == 7
    assert sorted(lines(a.train) + lines(a.validation)) == list(range(1, 51))  # nothing in both, nothing lost
    assert lines(a.validation) != lines(b.validation)  # the name is part of the key
    (again,) = load(tokenizer, TaskConfig(path=path), validation_samples=7)
    assert again == a
    (other,) = load(tokenizer, TaskConfig(path=path), validation_samples=7, seed=2)
    assert lines(other.validation) != lines(a.validation)


@pytest.mark.parametrize(("count", "asked", "held_out"), [(50, 64, 10), (50, 0, 0), (9, 64, 1), (4, 64, 0), (1, 64, 0)])
def test_at_most_a_fifth_is_held_out(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, count: int, asked: int, held_out: int
) -> None:
    (task,) = load(tokenizer, TaskConfig(path=write(tmp_path / "a.jsonl", count)), validation_samples=asked)
    assert (len(task.train), len(task.validation)) == (count - held_out, held_out)


def test_validation_file(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path, other = write(tmp_path / "a.jsonl", 10), write(tmp_path / "v.jsonl", 3, prefix="v")
    (task,) = load(tokenizer, TaskConfig(path=path, validation_path=other))
    assert len(task.train) == 10
    assert [sample.source for sample in task.validation] == [f"{other}:{i}" for i in (1, 2, 3)]
    with pytest.raises(ConfigError, match=r"data\[a\].validation_path=.*: is the task's training file; name another"):
        load(tokenizer, TaskConfig(path=path, validation_path=path))
    with pytest.raises(DataError, match=r"gone.jsonl: no such file"):
        load(tokenizer, TaskConfig(path=path, validation_path=str(tmp_path / "gone.jsonl")))


def test_counts(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "a.jsonl"
    records = [("p" * 4, "x"), ("p" * 9, "x"), ("p", " "), ("p" * 4, "yy")]
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in records))
    task = TaskConfig(path=str(path))
    (truncated,) = load(tokenizer, task, seq_length=8)
    assert (truncated.overlong, truncated.blank, lines(truncated.train)) == (1, 1, [1, 2, 4])
    assert [len(sample.token_ids) for sample in truncated.train] == [7, 8, 8]
    assert truncated.report == (
        "a: 3 training and 0 validation samples, 23 tokens (7 trained), 1 overlong, 1 blank answers"
    )
    (dropped,) = load(tokenizer, task, seq_length=8, overlong="drop")
    assert (dropped.overlong, lines(dropped.train)) == (1, [1, 4])
    with pytest.raises(DataError, match=r"a.jsonl:2: 12 tokens exceed seq_length=8"):
        load(tokenizer, task, seq_length=8, overlong="error")


def test_tasks_without_samples(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    long = TaskConfig(path=write(tmp_path / "long.jsonl", 3))
    with pytest.raises(DataError, match=r"leaves task 'long' no samples \(0 without an answer, 3 above seq_length=4"):
        load(tokenizer, long, seq_length=4, overlong="drop")
    blank = TaskConfig(path=write(tmp_path / "blank.jsonl", 2, answer=""))
    with pytest.raises(DataError, match=r"leaves task 'blank' no samples \(2 without an answer"):
        load(tokenizer, blank)
    with pytest.raises(DataError, match=r"empty.jsonl: holds no records"):
        load(tokenizer, TaskConfig(path=write(tmp_path / "empty.jsonl", 0)))


def test_real_code_task(shared: Path) -> None:
    """Code Alpaca has two records without an answer: they are left out and counted."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories260k")
    (task,) = load(tokenizer, TaskConfig(path=str(shared / "data" / "code" / "code_alpaca_2k.json")), seq_length=256)
    assert task.blank == 2
    assert len(task.train) + len(task.validation) == 2015
    assert max(len(sample.token_ids) for sample in task.train) == 256
    assert sum(sample.truncated > 0 for sample in task.train + task.validation) == task.overlong


def test_fingerprints_are_of_the_files_bytes(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    train, other = write(tmp_path / "train.jsonl", 3), write(tmp_path / "other.jsonl", 2, prefix="v")
    array = tmp_path / "array.json"
    array.write_text('[{"prompt": "p", "completion": "x"}]\n')
    config = DataConfig(data=[TaskConfig("a", train, other), TaskConfig("b", str(array))])
    assert data_paths(config) == {"a/train": train, "a/validation": other, "b/train": str(array)}
    found = data_fingerprints(load_tasks(config, tokenizer, 1))
    assert {name: digest for name, digest in found.items() if not name.endswith("/split")} == {
        name: hashlib.sha256(Path(path).read_bytes()).hexdigest() for name, path in data_paths(config).items()
    }


def test_the_fingerprint_of_a_split_is_of_its_records(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """It changes with the seed, the task's name and the number held out, and not with the place of the file."""
    write(tmp_path / "a.jsonl", 30)
    (tmp_path / "b").mkdir()
    write(tmp_path / "b" / "a.jsonl", 30)

    def split(seed: int = 1, held_out: int = 4, **task: str) -> str:
        config = DataConfig(
            data=[TaskConfig(**{"path": str(tmp_path / "a.jsonl")} | task)], validation_samples=held_out
        )
        [found] = load_tasks(config, tokenizer, seed)
        return found.fingerprints["split"]

    assert split() == split(path=str(tmp_path / "b" / "a.jsonl"))
    assert len({split(), split(seed=2), split(held_out=3), split(name="other")}) == 4


BROKEN = [
    '{"prompt": "p", "completion": ',  # cut off
    '{"prompt": "p"}',
    '{"prompt": "p", "completion": 3}',
    "[1]",
    '{"prompt": "p", "completion": "half \\ud800"}',
    "[" * 100_000,
    '{"prompt": "p", "completion": ' + "1" * 5000 + "}",
    '{"prompt": "p\xff", "completion": "x"}',
]


@pytest.mark.parametrize(
    ("line", "where"),
    # a file that starts with a bracket is one array
    [(line, where) for line in BROKEN for where in (0, 2) if where or not line.startswith("[")],
    ids=lambda value: str(value)[:40],
)
def test_records_that_cannot_be_used(line: str, where: int, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    write(file := tmp_path / "t.jsonl", 6)
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:where], line.encode("latin-1") + b"\n", *lines[where:]]))
    task = TaskConfig(path=str(file))
    with pytest.raises(DataError, match=rf"^{re.escape(str(file))}:{where + 1}: [^\n]*$"):
        load(tokenizer, task)
    [skipping] = load(tokenizer, task, corrupt_data="skip", validation_samples=0)
    assert (len(skipping.train), skipping.skipped) == (6, 1)
    assert f", 1 corrupt and skipped, for example\n{file}:{where + 1}: " in skipping.report
    file.write_bytes(b"{}\n" + line.encode("latin-1") + b"\n")
    with pytest.raises(DataError, match=r"none of its 2 records can be used, for example .*t\.jsonl:1: "):
        load(tokenizer, task, corrupt_data="skip")


def test_skipped_records_are_counted_and_the_first_told(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    write(file := tmp_path / "t.jsonl", 6)
    file.write_text(file.read_text() + '{"prompt": "p"}\n' * 1234)
    [task] = load(tokenizer, TaskConfig(path=str(file), prompt_template="{prompt}?"), corrupt_data="skip")
    first, *told = task.report.splitlines()
    assert first.endswith(", 1,234 corrupt and skipped, for example")
    assert told == task.skip_reasons
    assert [line.partition(": ")[0] for line in task.skip_reasons] == [f"{file}:{n}" for n in (7, 8, 9)]


@pytest.mark.parametrize("template", ["{prompt:>99999}", "{prompt:{prompt}}", "{prompt.__class__}", "{prompt[0]}"])
def test_templates_only_fill_in_columns(template: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match=r"^data\[t\]\.prompt_template="):
        load(tokenizer, TaskConfig(path=write(tmp_path / "t.jsonl", 6), prompt_template=template))


@pytest.mark.parametrize("is_chat", [False, True])
def test_special_tokens_that_the_text_spells(is_chat: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """They are counted where the data writes them, not where a template does."""
    records = [{"prompt": "p", "completion": "c"}, {"prompt": "<s></s>", "completion": "a</s>b<|im_en"}]
    task = TaskConfig(path=str(tmp_path / "t.jsonl"), prompt_template="<|im_start|>{prompt}")
    if is_chat:
        task.prompt_template = ""
        roles = (("user", "prompt"), ("assistant", "completion"))
        records = [{"messages": [{"role": role, "content": r[name]} for role, name in roles]} for r in records]
    Path(task.path).write_text("".join(json.dumps(record) + "\n" for record in records))
    [found] = load(tokenizer, task, validation_samples=0)
    assert found.report.splitlines()[1:] == [
        f"special tokens inside the text: 3 (</s> 2, <s> 1), first at {task.path}:2; "
        "allow_special_tokens_in_data=false refuses them"
    ]
    message = r"t\.jsonl:2: its text spells the special token <s>, which is not allowed; remove it, or set allow_spec"
    with pytest.raises(DataError, match=message):
        load(tokenizer, task, allow_special_tokens_in_data=False)
    [skipping] = load(tokenizer, task, allow_special_tokens_in_data=False, corrupt_data="skip", validation_samples=0)
    assert (len(skipping.train), skipping.skipped, skipping.special_tokens) == (1, 1, [])


def test_special_tokens_that_are_only_added(tmp_path: Path) -> None:
    """As Llama 3's, which are in no special_tokens_map."""
    tokenizer = letter_tokenizer()
    tokenizer.add_tokens([AddedToken("<|reserved|>", special=True), AddedToken("<think>", special=False)])
    [found] = load(tokenizer, TaskConfig(path=write(tmp_path / "t.jsonl", 2, answer="<|reserved|><think>")))
    assert "2 (<|reserved|> 2), first" in found.report
