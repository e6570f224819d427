"""Hugging Face model directories: what transformers itself reads from them, checked so that damage is named.

No code from a directory is ever run: weights have to be safetensors, and ``trust_remote_code`` is off.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from malora_dist.errors import CheckpointError
from malora_dist.files import file_within, foreign_reader, is_regular_file, read_json_object

#: What travels with a model besides its weights and is JSON.
_JSON_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
_CURE = "copy the file again, or download the model again"


def weight_map(directory: Path) -> dict[str, Path]:
    """{key: file} of a sharded model's index; empty for a model in one file, which goes first as in transformers.

    Links are followed, as the Hugging Face hub's cache consists of them; names with a directory in them are not.

    Raises:
        CheckpointError: no safetensors files, or an index that is none.
    """
    if is_regular_file(directory / "model.safetensors"):
        return {}
    index = directory / "model.safetensors.index.json"
    if os.path.lexists(index):
        listed = read_json_object(index, CheckpointError, "copy it again").get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise CheckpointError(f"{index}: is not an index of safetensors files; copy it again")
        return {key: file_within(directory, name, index) for key, name in listed.items()}
    if any(directory.glob("*.bin")):
        raise CheckpointError(
            f"{directory}: holds its weights as .bin files, must be safetensors; save it again with "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
        )
    raise CheckpointError(f"{directory}: has no model.safetensors and no {index.name}; download the weights")


def check_companions(directory: Path) -> None:
    """Check what lies beside the weights, where it is there: tokenizer and generation config.

    Raises:
        CheckpointError: naming the damaged file.
    """
    for name in _JSON_FILES:
        if os.path.lexists(directory / name):
            read_json_object(directory / name, CheckpointError, _CURE)
    file = directory / "tokenizer.json"
    if os.path.lexists(file):
        read_json_object(file, CheckpointError, _CURE)
        with foreign_reader(file, _CURE):
            Tokenizer.from_file(str(file))
    file = directory / "generation_config.json"
    if os.path.lexists(file):
        read_json_object(file, CheckpointError, _CURE)
        with foreign_reader(file, _CURE):
            GenerationConfig.from_pretrained(directory, local_files_only=True)


def load_tokenizer(directory: Path, vocab_size: int) -> PreTrainedTokenizerBase:
    """A model's tokenizer.

    Args:
        vocab_size: of the model.

    Raises:
        CheckpointError: its files are missing or damaged, or need a library that is not there; it has tokens that the
            model has no embedding of, or neither an EOS nor a pad token.
    """
    check_companions(directory)
    _check_sentencepiece(directory)
    cure = "import a model that has its tokenizer files"
    with foreign_reader(directory, cure, "its tokenizer cannot be read"):
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
        special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        ids = {*tokenizer.get_vocab().values(), *tokenizer("a").input_ids, *special} - {None}
        highest = max(ids, default=-1)
        name = tokenizer.convert_ids_to_tokens(max(highest, 0))
    if highest < 0:
        raise CheckpointError(f"{directory}: its tokenizer has no tokens; {cure}")
    if highest >= vocab_size:
        raise CheckpointError(
            f"{directory}: its tokenizer's token {name!r} has the id {highest}, but the model has embeddings of ids 0 "
            f"to {vocab_size - 1} only ({vocab_size} rows); take the tokenizer that belongs to the model, or enlarge "
            "the model with resize_token_embeddings"
        )
    if tokenizer.eos_token_id is None and tokenizer.pad_token_id is None:
        cure = "name one that it has in tokenizer_config.json, as eos_token"
        raise CheckpointError(f"{directory}: its tokenizer has neither an EOS token nor a pad token; {cure}")
    return tokenizer


def _check_sentencepiece(directory: Path) -> None:
    """Refuse a tokenizer that only has SentencePiece's form, which transformers cannot read without its library.

    (It tries tiktoken next, of which Llama 3's first release holds a file under the same name.)
    """
    file = directory / "tokenizer.model"
    if not is_regular_file(file) or os.path.lexists(directory / "tokenizer.json"):
        return
    if not any(importlib.util.find_spec(library) for library in ("sentencepiece", "tiktoken")):
        raise CheckpointError(
            f"{file}: is read by the library sentencepiece, which is not installed; pip install sentencepiece, or add "
            "the model's tokenizer.json"
        )
