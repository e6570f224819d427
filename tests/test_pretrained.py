"""Damaged Hugging Face directories: the file is named at import, in training and in evaluation; and no code is run."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
from pathlib import Path

import pytest

from malora_dist.checkpoint.convert import import_hf
from malora_dist.checkpoint.tensor_files import HfWeights
from malora_dist.errors import CheckpointError
from malora_dist.families.base import family_of
from malora_dist.hf.evaluate import load_adapter, load_base
from malora_dist.hf.read import read_peft_adapter
from malora_dist.pretrained import check_companions, load_tokenizer
from tests.fuzzing import models

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return Path(shutil.copytree(models() / "llama", tmp_path / "llama"))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return Path(shutil.copytree(models() / "shards", tmp_path / "shards"))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000], ids=lambda content: repr(content[:3]))
def test_damaged_companions_are_named(name: str, content: bytes, llama: Path) -> None:
    (llama / name).write_bytes(content)
    for read in (
        lambda: import_hf(llama, llama.parent / "base"),
        lambda: load_tokenizer(llama, 50),
        lambda: load_base(llama),
    ):
        with pytest.raises(CheckpointError, match=rf"^{re.escape(str(llama / name))}: is not (JSON|a JSON object)"):
            read()
    assert not (llama.parent / "base").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", {}, "tokenizer.json: cannot be read"),
        ("tokenizer.json", {"version": "1.0", "model": {"type": "BPE"}}, "tokenizer.json: cannot be read"),
        (
            "generation_config.json",
            {"eos_token_id": [], "max_new_tokens": -1},
            "generation_config.json: cannot be read",
        ),
        ("tokenizer_config.json", {"tokenizer_class": 3}, "its tokenizer cannot be read"),
    ],
)
def test_json_that_is_no_companion(name: str, content: object, message: str, llama: Path) -> None:
    (llama / name).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(llama, 50)


def test_a_tokenizer_without_files(llama: Path) -> None:
    for file in llama.glob("tokenizer*"):
        file.unlink()
    check_companions(llama)
    with pytest.raises(CheckpointError, match=r"its tokenizer cannot be read .* import a model that has its tokenizer"):
        load_tokenizer(llama, 50)


def _edit(file: Path, **changes: object) -> None:
    """Set keys of a JSON file; None removes one."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_tokens_without_an_embedding(llama: Path) -> None:
    assert load_tokenizer(llama, 50).eos_token_id == 2
    last = load_tokenizer(llama, 50).convert_ids_to_tokens(49)
    with pytest.raises(CheckpointError, match=rf"token '{last}' has the id 49, but .* 0 to 48 only \(49 rows\); take"):
        load_tokenizer(llama, 49)
    _edit(llama / "tokenizer_config.json", pad_token="<mypad>")
    with pytest.raises(CheckpointError, match=r"token '<mypad>' has the id 50, but .* \(50 rows\)"):
        load_tokenizer(llama, 50)


def test_an_id_that_only_a_post_processor_writes(llama: Path) -> None:
    special = {"id": "<s>", "ids": [70], "tokens": ["<s>"]}
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    processor = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": {"<s>": special}}
    _edit(llama / "tokenizer.json", post_processor=processor)
    with pytest.raises(CheckpointError, match=r"token None has the id 70, but"):
        load_tokenizer(llama, 50)


def test_neither_eos_nor_pad(llama: Path) -> None:
    _edit(llama / "tokenizer_config.json", pad_token=None)
    assert load_tokenizer(llama, 50).pad_token_id is None
    _edit(llama / "tokenizer_config.json", eos_token=None)
    with pytest.raises(
        CheckpointError, match=r"llama: its tokenizer has neither an EOS token nor a pad token; name one"
    ):
        load_tokenizer(llama, 50)


def test_a_sentencepiece_model_without_its_library(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    libraries = ("sentencepiece", "tiktoken")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *p: None if name in libraries else found(name, *p))
    (llama / "tokenizer.model").write_bytes(b"x")
    assert load_tokenizer(llama, 50)  # tokenizer.json goes first
    (llama / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: is read by the library sentencepiece.*; pip install"):
        load_tokenizer(llama, 50)


@pytest.mark.parametrize("name", ["../llama/model.safetensors", "/etc/passwd", "", 3, None, "a\0"])
def test_an_index_cannot_leave_its_directory(name: object, shards: Path) -> None:
    index = shards / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][next(iter(content["weight_map"]))] = name
    index.write_text(json.dumps(content))
    for read in (HfWeights, load_base):
        with pytest.raises(
            CheckpointError, match=r"index\.json: names the file .* must be a name in the same directory"
        ):
            read(shards)


@pytest.mark.parametrize("kind", ["fifo", "directory", "loop", "device"])
@pytest.mark.parametrize("name", ["model-1.safetensors", "config.json", "tokenizer.json"])
def test_what_is_no_file_is_refused_unopened(kind: str, name: str, shards: Path) -> None:
    file = shards / name
    file.unlink()
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "directory":
        file.mkdir()
    else:
        file.symlink_to(file if kind == "loop" else "/dev/zero")
    with pytest.raises(CheckpointError):
        import_hf(shards, shards.parent / "base")


def test_links_are_followed(shards: Path, tmp_path: Path) -> None:
    """The hub's cache consists of them."""
    file = shards / "model-1.safetensors"
    file.rename(tmp_path / "blob")
    file.symlink_to(tmp_path / "blob")
    assert HfWeights(shards).shapes.keys() == HfWeights(models() / "llama").shapes.keys()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 2**31}, "hidden_size=2147483648, must be a whole number"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000, must be a whole number"),
        ({"head_dim": -8}, "head_dim=-8, must be a whole number"),
        ({"vocab_size": True}, "must be a whole number|transformers refuses it"),
        ({"num_attention_heads": 0, "head_dim": None}, "transformers refuses it"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan, must be a number"),
        ({"rope_parameters": ["default"]}, "has rope_parameters=.*must be an object|transformers refuses it"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0.0}}, "gives infinite frequencies"),
    ],
)
def test_configs_of_impossible_models(fields: dict[str, object], message: str, llama: Path) -> None:
    content = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(content | fields))
    with pytest.raises(CheckpointError, match=message):
        family_of(llama).rope_inv_freq()


def change_adapter(folder: Path, **fields: object) -> Path:
    adapter = Path(shutil.copytree(models() / "lora", folder / "lora"))
    content = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(content | fields))
    return adapter


def test_an_adapter_cannot_have_modules_imported(tmp_path: Path) -> None:
    adapter = change_adapter(tmp_path, megatron_config={"x": 1}, megatron_core="antigravity")
    with pytest.raises(CheckpointError, match="has a megatron_config, must have none; remove it"):
        load_adapter(load_base(models() / "llama")[0], adapter)


@pytest.mark.parametrize(
    "fields",
    [{"target_modules": [["q_proj"]]}, {"r": True}, {"r": 2.5}, {"lora_alpha": float("nan")}, {"peft_type": []}],
)
def test_adapters_that_are_none(fields: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: "):
        read_peft_adapter(change_adapter(tmp_path, **fields))


def test_no_code_of_others_is_run() -> None:
    """No remote code, no shell, and temporary files only by tempfile, which makes them private."""
    forbidden = re.compile(
        r"trust_remote_code=(?!False)|shell=True|os\.system\(|os\.popen\(|mktemp\(|\beval\(\w|\bexec\("
    )
    product = [*(ROOT / "malora_dist").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]
    found = [f"{file}: {match}" for file in product for match in forbidden.findall(file.read_text(encoding="utf-8"))]
    assert found == []
