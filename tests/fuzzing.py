"""Damage to input, and what must hold whatever the damage: nothing but the project's own errors leaves a reader.

A property takes a source of randomness and an empty folder, damages a valid input there and reads it. It fails by
raising anything that is no :class:`MaloraError`. tests/test_fuzzing.py runs each a few times.
"""

from __future__ import annotations

import atexit
import csv
import functools
import gzip
import io
import json
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from malora_dist.checkpoint.tensor_files import HfWeights
from malora_dist.config import Config
from malora_dist.config_file import load_config, save_config
from malora_dist.config_sections import DataConfig, TaskConfig
from malora_dist.data.dataset import TaskDataset, load_tasks
from malora_dist.errors import MaloraError
from malora_dist.families.base import family_of
from malora_dist.families.conversion import check_coverage, conversion_map
from malora_dist.hf.config import MaloraConfig
from malora_dist.hf.evaluate import load_adapter, load_base
from malora_dist.hf.read import read_peft_adapter
from malora_dist.pretrained import check_companions, load_tokenizer
from tests.conftest import character_tokenizer, write_llama

Property = Callable[[random.Random, Path], None]
PROPERTIES: dict[str, Property] = {}

_CHAT = (
    "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
_TARGETS = ["q_proj", "down_proj"]
#: What a value of JSON or YAML is replaced by.
_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**30, -(10**400), 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", " ", "x", "0", "null", "\0", "\ud800", "é\u202e", "../x", "/etc/passwd", "a\nb", "{prompt}", "{0}", "{",
    "${save}", "${oc.env:HOME}", "x" * 5000, [], {}, [None], ["x"], [[]], {"x": 1}, {"": {}}, [1, "a"],
]  # fmt: skip
#: What is put between the bytes of a file.
_PIECES = [
    b"\0", b"\xff", b"\xef\xbb\xbf", b"\r", b"\n", b"\n\n", b'"', b"'", b"\\", b"{", b"}", b"[", b"]", b":", b",", b"#",
    b"&a ", b"*a", b"!!python/name:os", b"<<: ", b"- ", b"null", b"NaN", b"-1", b"1e999", b"9" * 4400, b"[" * 2000,
    b'{"a":' * 2000, b"\\ud800", b"\\u0000", b"\xed\xa0\x80", b"../", b"${", b"%", b"\t",
]  # fmt: skip


def register(function: Property) -> Property:
    """List a property under the name of its function."""
    PROPERTIES[function.__name__] = function
    return function


def damaged_bytes(rng: random.Random, content: bytes) -> bytes:
    """A few bytes changed, left out, put in or doubled, or the end cut off."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(6)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1 and data:
            data[at % len(data)] = rng.randrange(256)
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            del data[at : at + rng.randrange(1, 20)]
        elif kind == 4:
            data[at:at] = data[at : at + rng.randrange(1, 60)]
        else:
            data[at:at] = rng.choice(_PIECES)
    return bytes(data)


def damaged_value(rng: random.Random, value: Any, depth: int = 0) -> Any:
    """A value of JSON with one place in it replaced, left out or added to."""
    if not value or not isinstance(value, dict | list) or (depth and rng.random() < 0.2):
        return _any_value(rng)
    copy: Any = value.copy()
    key: Any = rng.choice(list(copy)) if isinstance(copy, dict) else rng.randrange(len(copy))
    kind = rng.random()
    if kind < 0.15:
        del copy[key]
    elif kind < 0.25 and isinstance(copy, dict):
        copy[rng.choice(["", "x", "\0", "\ud800", "lr", "3"])] = _any_value(rng)
    elif kind < 0.3 and isinstance(copy, list):
        copy.append(_any_value(rng))
    else:
        copy[key] = damaged_value(rng, copy[key], depth + 1)
    return copy


def _any_value(rng: random.Random) -> Any:
    if rng.random() < 0.05:
        return functools.reduce(lambda inner, _: [inner], range(rng.choice((50, 700))), 1)
    return rng.choice(_VALUES)


def damage(rng: random.Random, file: Path) -> None:
    """Damage a file, by its bytes or (JSON) by its structure; or put something else in its place."""
    kind = rng.random()
    if kind < 0.04:
        file.unlink()
        if rng.random() < 0.5:
            file.mkdir()
        elif rng.random() < 0.5:
            file.symlink_to(file.name)
    elif kind < 0.5 and file.suffix == ".json":
        file.write_text(json.dumps(damaged_value(rng, json.loads(file.read_bytes()))))
    else:
        file.write_bytes(damaged_bytes(rng, file.read_bytes()))


def politely(read: Callable[[], Any]) -> Any:
    """What it returns; None if it is refused, which has to be by an error of the project that says something."""
    try:
        return read()
    except MaloraError as error:
        if not 10 < len(str(error)) < 20_000:
            raise AssertionError(f"a message of {len(str(error))} characters") from error
        return None


# --- valid inputs


@functools.cache
def models() -> Path:
    """A folder with a Llama in one file (`llama`) and in several (`shards`), and adapters of it (`malora`, `lora`)."""
    folder = Path(tempfile.mkdtemp(prefix="malora-fuzzing-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write_llama(folder / "llama", num_hidden_layers=1, hidden_size=16, intermediate_size=8)
    (folder / "llama" / "chat_template.jinja").write_text(_CHAT)
    shutil.copytree(folder / "llama", folder / "shards")
    tensors = load_file(folder / "shards" / "model.safetensors")
    (folder / "shards" / "model.safetensors").unlink()
    names = {key: f"model-{1 + i % 2}.safetensors" for i, key in enumerate(tensors)}
    for name in set(names.values()):
        save_file({k: tensors[k] for k in tensors if names[k] == name}, folder / "shards" / name, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    (folder / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))
    configs = {
        "malora": MaloraConfig(lora_rank=2, shared_dim=4, num_lora_experts=2, topk=1, target_modules=_TARGETS),
        "lora": LoraConfig(r=2, target_modules=_TARGETS),
    }
    for name, config in configs.items():
        get_peft_model(load_base(folder / "llama")[0], config).save_pretrained(folder / name)
    return folder


def _copied(name: str, folder: Path) -> Path:
    return Path(shutil.copytree(models() / name, folder / name))


# --- configs


_CONFIG: dict[str, Any] = {
    "pretrained_checkpoint": "base", "method": "malora", "lora_rank": 8, "target_modules": ["q_proj", "linear_fc1"],
    "data": [{"name": "a", "path": "a.jsonl", "weight": 2.0}, {"path": "b.json", "prompt_template": "{x}"}],
    "lr": 1e-3, "train_iters": 5, "save": "runs/${method}", "bf16": True, "seed": 3,
}  # fmt: skip


def _load_and_save(file: Path, overrides: list[str]) -> None:
    config = load_config(file, overrides)
    config.validate(1)
    save_config(config, file.with_name("saved.yaml"))
    again = load_config(file.with_name("saved.yaml"))
    again.validate(1)
    assert again == config


@register
def config_files(rng: random.Random, folder: Path) -> None:
    """YAML with damaged bytes."""
    file = folder / "c.yaml"
    file.write_bytes(damaged_bytes(rng, yaml.safe_dump(_CONFIG).encode()))
    politely(lambda: _load_and_save(file, []))


@register
def config_values(rng: random.Random, folder: Path) -> None:
    """Any value under any key."""
    file = folder / "c.yaml"
    config = damaged_value(rng, _CONFIG | {rng.choice(list(vars(Config()))): _any_value(rng)})
    file.write_text(json.dumps(config))  # JSON is YAML
    politely(lambda: _load_and_save(file, []))


@register
def config_overrides(rng: random.Random, folder: Path) -> None:
    """Overrides with damaged text and any value."""
    file = folder / "c.yaml"
    file.write_text(yaml.safe_dump(_CONFIG))
    key = rng.choice([*vars(Config()), "data[0].path", "data[1].weight", "include", "data[7].x", "a.b"])
    text = f"{key}={rng.choice([*map(str, _VALUES), '[1,', '{a: b}', '*a', '${lr}'])}"
    if rng.random() < 0.5:
        text = damaged_bytes(rng, text.encode(errors="surrogatepass")).decode(errors="surrogateescape")
    politely(lambda: _load_and_save(file, [text]))


# --- data


_RECORDS: dict[str, list[dict[str, Any]]] = {
    "completion": [{"prompt": f"p {i}", "completion": "ab"} for i in range(4)],
    "alpaca": [{"instruction": "say", "input": str(i), "output": "a b", "answer": "b"} for i in range(4)],
    "gsm8k": [{"question": f"{i}+1?", "answer": f"so #### {i + 1}"} for i in range(4)],
    "messages": [
        {"messages": [{"role": "user", "content": f"hi {i}"}, {"role": "assistant", "content": "ab"}]} for i in range(4)
    ],
}


@functools.cache
def _chat_tokenizer() -> Any:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = _CHAT
    return tokenizer


def _load_task(file: Path, corrupt_data: str, **task: str) -> TaskDataset:
    config = DataConfig(data=[TaskConfig(path=str(file), **task)], seq_length=24, corrupt_data=corrupt_data)
    [loaded] = load_tasks(config, _chat_tokenizer(), seed=1)
    assert loaded.report
    return loaded


def _read_data(rng: random.Random, file: Path) -> None:
    task = {"prompt_template": rng.choice(["{prompt}", "{prompt!r:>9}", "{x}", "{"])} if rng.random() < 0.2 else {}
    strict = politely(lambda: _load_task(file, "refuse", **task))
    lenient = politely(lambda: _load_task(file, "skip", **task))
    if strict is not None:
        assert lenient == strict
        assert lenient.skipped == 0


@register
def data_lines(rng: random.Random, folder: Path) -> None:
    """JSON Lines of every format with damaged bytes or records; what is accepted is also accepted with `skip`."""
    records: list[Any] = _RECORDS[rng.choice(list(_RECORDS))]
    if rng.random() < 0.5:
        records = damaged_value(rng, records)
    lines = "".join(json.dumps(record) + "\n" for record in (records if isinstance(records, list) else [records]))
    file = folder / "d.jsonl"
    file.write_bytes(damaged_bytes(rng, lines.encode()) if rng.random() < 0.6 else lines.encode())
    _read_data(rng, file)


@register
def data_arrays(rng: random.Random, folder: Path) -> None:
    """A JSON array of every format, damaged."""
    file = folder / "d.json"
    file.write_text(json.dumps(_RECORDS[rng.choice(list(_RECORDS))]))
    damage(rng, file)
    _read_data(rng, file)


@register
def data_tables(rng: random.Random, folder: Path) -> None:
    """CSV and Parquet files and compressed ones of two formats, damaged."""
    records = _RECORDS[rng.choice(("completion", "alpaca"))]
    file = folder / rng.choice(("d.csv", "d.parquet", "d.jsonl.gz", "d.csv.gz"))
    text = io.StringIO()
    rows = csv.DictWriter(text, list(records[0]), quoting=csv.QUOTE_ALL)
    rows.writeheader()
    rows.writerows(records)
    content = text.getvalue().encode()
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), file)
    elif file.suffix == ".gz":
        content = content if file.stem == "d.csv" else "".join(json.dumps(r) + "\n" for r in records).encode()
        file.write_bytes(gzip.compress(content, mtime=0))
    else:
        file.write_bytes(content)
    damage(rng, file)
    _read_data(rng, file)


# --- Hugging Face directories


@register
def model_configs(rng: random.Random, folder: Path) -> None:
    """config.json, as the converter and tools/budget.py read it."""
    directory = folder / "m"
    directory.mkdir()
    shutil.copy(models() / "llama" / "config.json", directory)
    damage(rng, directory / "config.json")

    def read() -> None:
        family = family_of(directory)
        family.rope_inv_freq()
        if family.hf.num_hidden_layers < 100:
            conversion_map(family)

    politely(read)


@register
def weights(rng: random.Random, folder: Path) -> None:
    """The safetensors files and their index, as the converter reads them."""
    directory = _copied(rng.choice(("llama", "shards")), folder)
    damage(rng, directory / rng.choice(sorted(p.name for p in directory.iterdir() if "safetensors" in p.name)))

    def read() -> None:
        found = HfWeights(directory)
        check_coverage(directory, family_of(directory), found.shapes)
        for key, shape in found.shapes.items():
            assert tuple(found.read(key).shape) == shape

    politely(read)


@register
def tokenizers(rng: random.Random, folder: Path) -> None:
    """Tokenizer files, as import, training and evaluation read them; a tokenizer that loads gives ids of the model."""
    directory = _copied("llama", folder)
    damage(rng, directory / rng.choice(("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")))
    politely(lambda: check_companions(directory))
    tokenizer = politely(lambda: load_tokenizer(directory, 50))
    if tokenizer is None:
        return
    file = folder / "d.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in _RECORDS[rng.choice(("completion", "messages"))]))
    config = DataConfig(data=[TaskConfig(path=str(file))])
    for task in politely(lambda: load_tasks(config, tokenizer, seed=1)) or ():
        assert all(0 <= token < 50 for sample in task.train for token in sample.token_ids)


@register
def models_to_evaluate(rng: random.Random, folder: Path) -> None:
    """What tools/evaluate.py loads; config.json by its bytes only, since one of 10**9 layers is built as asked."""
    directory = _copied(rng.choice(("llama", "shards")), folder)
    names = sorted(p.name for p in directory.iterdir() if p.suffix in (".safetensors", ".json") and p.name[0] != "c")
    damage(rng, directory / rng.choice(names))
    politely(lambda: load_base(directory))


# --- adapters


@register
def adapters_to_import(rng: random.Random, folder: Path) -> None:
    """PEFT directories, as tools/convert_hf.py import-adapter reads them."""
    directory = _copied(rng.choice(("malora", "lora")), folder)
    damage(rng, directory / rng.choice(("adapter_config.json", "adapter_model.safetensors")))
    politely(lambda: read_peft_adapter(directory))


@register
def adapters_to_evaluate(rng: random.Random, folder: Path) -> None:
    """PEFT directories, as tools/evaluate.py loads them."""
    directory = _copied(rng.choice(("malora", "lora")), folder)
    damage(rng, directory / rng.choice(("adapter_config.json", "adapter_model.safetensors")))
    with torch.no_grad():
        politely(lambda: load_adapter(load_base(models() / "llama")[0], directory))
