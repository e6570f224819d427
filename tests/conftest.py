"""Fixtures: a tiny Llama with its tokenizer and data, and the pool of distributed workers."""

from __future__ import annotations

import importlib.util
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.workers import WorkerPool

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789 +-*/=:,.?#"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and data beside the checkout; tests that need it skip without."""
    if not SHARED.is_dir():
        pytest.skip("no shared/ folder with real models and data beside the checkout")
    return SHARED


@pytest.fixture
def convert_tool() -> ModuleType:
    """tools/convert_hf.py as a module."""
    spec = importlib.util.spec_from_file_location("convert_hf", ROOT / "tools" / "convert_hf.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def workers() -> Iterator[WorkerPool]:
    pool = WorkerPool()
    yield pool
    pool.close()


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, with BOS, EOS and PAD; 50 tokens."""
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *ALPHABET])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="right"
    )


def write_llama(directory: Path, seed: int = 0, **overrides: object) -> Path:
    """A tiny random Llama, or what ``model_type`` says, in Hugging Face format with the character tokenizer."""
    settings: dict[str, object] = {
        "model_type": "llama",
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 50, "max_position_embeddings": 128,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
        "initializer_range": 0.2,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**settings, **overrides}))
    model.save_pretrained(directory)
    character_tokenizer().save_pretrained(directory)
    return directory


def write_tasks(directory: Path, samples: int = 60, seed: int = 0) -> list[Path]:
    """Two small tasks of unequal lengths in prompt/completion form."""
    rng = random.Random(seed)
    directory.mkdir(parents=True, exist_ok=True)
    files = []
    for name, longest in (("reverse", 6), ("add", 14)):
        lines = []
        for _ in range(samples):
            if name == "reverse":
                word = "".join(rng.choices("abcdefghij", k=rng.randint(3, longest)))
                record = {"prompt": f"reverse {word}:", "completion": word[::-1]}
            else:
                a, b = rng.randint(0, 99), rng.randint(0, 99)
                record = {"prompt": f"what is {a}+{b}?" + " " * rng.randint(0, 6), "completion": str(a + b)}
            lines.append(json.dumps(record))
        file = directory / f"{name}.jsonl"
        file.write_text("\n".join(lines) + "\n")
        files.append(file)
    return files


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="session")
def base_dir(llama_dir: Path) -> Path:
    """`llama_dir` converted for megatron."""
    from malora_dist.checkpoint.convert import import_hf

    target = llama_dir.parent / "megatron"
    import_hf(llama_dir, target)
    return target


@pytest.fixture(scope="session")
def task_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_tasks(tmp_path_factory.mktemp("tasks"))
