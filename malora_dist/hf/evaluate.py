"""Scores a Hugging Face model, with or without an adapter: exact match and mean answer loss per task."""

from __future__ import annotations

import argparse
import contextlib
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftConfig, PeftModel, PeftModelForCausalLM, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

import malora_dist.hf  # noqa: F401 - registers the tuner
from malora_dist.config_sections import TaskConfig
from malora_dist.data.formats import Example, load_examples
from malora_dist.data.tokenization import TokenizedExample, encode_example, fit
from malora_dist.errors import CheckpointError, ConfigError, DataError, exit_on_user_error
from malora_dist.files import foreign_reader, is_regular_file, path_argument, read_json_object, stem_of
from malora_dist.hf.keys import check_tensors
from malora_dist.pretrained import check_companions, load_tokenizer, weight_map


@dataclass(frozen=True)
class Score:
    """One task's result. `truncated` samples lost the start of their prompt to the model's context."""

    samples: int
    exact_match: float
    answer_loss: float
    answer_tokens: int
    truncated: int


def load_base(directory: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model (in its stored dtype, eval mode) and tokenizer of a local directory.

    Raises:
        CheckpointError: it is not a complete Hugging Face model with its tokenizer.
    """
    if not is_regular_file(directory / "config.json"):
        raise CheckpointError(f"{directory}: is not a Hugging Face model (no config.json); name a model's directory")
    read_json_object(directory / "config.json", CheckpointError, "copy the file again")
    check_companions(directory)
    weight_map(directory)
    with foreign_reader(directory, "download or convert it again", "cannot be loaded"):
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype="auto", local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
    embeddings: Any = model.get_input_embeddings()
    return model.eval(), load_tokenizer(directory, embeddings.weight.shape[0])


def load_adapter(base: PreTrainedModel, directory: Path) -> PeftModel:
    """Put a saved PEFT adapter of any method on a base, eval mode; every key and shape has to fit.

    Raises:
        CheckpointError: it is not a PEFT adapter, or one of another base.
    """
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        if not is_regular_file(directory / name):
            raise CheckpointError(f"{directory}: is not a PEFT adapter (no {name}); name a directory that is")
    raw = read_json_object(directory / CONFIG_NAME, CheckpointError, "export it again")
    if raw.get("megatron_config"):  # PEFT then imports whatever module the file names
        raise CheckpointError(f"{directory / CONFIG_NAME}: has a megatron_config, must have none; remove it")
    try:
        with foreign_reader(directory, "export it again", "cannot be loaded"):
            config = PeftConfig.from_pretrained(str(directory))
            config.inference_mode = True
            with warnings.catch_warnings():  # PEFT asks transformers for a name that was renamed
                warnings.filterwarnings("ignore", message=".*`is_gradient_checkpointing` is deprecated.*")
                model = PeftModelForCausalLM(base, config)
            tensors = load_file(directory / SAFETENSORS_WEIGHTS_NAME)
    except ConfigError as error:
        raise CheckpointError(f"{directory}: {error}") from error
    present = model.state_dict()
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    expected |= {key: present[key] for key in tensors if key in present}  # embeddings saved with the adapter
    check_tensors(
        str(directory),
        {k: t.shape for k, t in expected.items()},
        {k: t.shape for k, t in tensors.items()},
        "the adapter is incomplete or was trained on another base",
    )
    with foreign_reader(directory, "export it again", "cannot be loaded"):
        set_peft_model_state_dict(model, tensors)
    return model.eval()


def extract_answer(generated: str, example: Example) -> str:
    """What exact match compares with :func:`reference_answer`.

    Without a reference it is the whole stripped text. With one, the sample's own answer shows what
    stands before the reference on its line (``####``, ``the correct answer is``), and the rest of
    that line in the generated text counts.
    """
    marker = example.answer.rpartition(example.reference)[0].rpartition("\n")[2].strip() if example.reference else ""
    if not marker or marker not in generated:
        return generated.strip()
    rest = generated.partition(marker)[2].strip()
    return rest.partition("\n")[0].strip()


def reference_answer(example: Example, tokens: TokenizedExample, tokenizer: PreTrainedTokenizerBase) -> str:
    """The reference, or else the whole answer, stripped; a chat template's marks are not part of it."""
    if example.templated:
        return _decode(tokenizer, tokens.token_ids[_answer_start(tokens) :])
    return (example.reference or example.answer).strip()


def evaluate(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    batch_size: int = 8,
    max_new_tokens: int = 256,
    description: str = "",
) -> Score:
    """Greedy generation and teacher-forced loss over all examples.

    Raises:
        ConfigError: max_new_tokens leaves no room for a prompt in the model's context.
    """
    context = model.config.max_position_embeddings
    if max_new_tokens >= context:
        raise ConfigError(
            "--max-new-tokens", max_new_tokens, f"must be below the model's context of {context} tokens", "lower it"
        )
    encoded = [encode_example(example, tokenizer) for example in examples]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].token_ids), reverse=True)  # little padding
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    hits, tokens, truncated, loss = 0, 0, 0, 0.0
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    console = Console(stderr=True)
    for rows in track(batches, description, console=console, transient=True, disable=not console.is_terminal):
        prompts = [_fitted(_prompt_of(encoded[i]), context - max_new_tokens) for i in rows]
        whole = [_fitted(encoded[i], context) for i in rows]
        batch_loss, batch_tokens = _answer_loss(model, whole, pad)
        loss, tokens = loss + batch_loss, tokens + batch_tokens
        generated = _generate(model, tokenizer, [p.token_ids for p in prompts], max_new_tokens, pad)
        for i, text in zip(rows, generated, strict=True):
            hits += extract_answer(text, examples[i]) == reference_answer(examples[i], encoded[i], tokenizer)
        truncated += sum(bool(p.truncated or w.truncated) for p, w in zip(prompts, whole, strict=True))
    return Score(len(examples), hits / len(examples), loss / tokens, tokens, truncated)


@torch.inference_mode()
def _answer_loss(model: torch.nn.Module, rows: Sequence[TokenizedExample], pad: int) -> tuple[float, int]:
    """Sum of the cross-entropies of the answer tokens of one batch, in float32, and their number."""
    ids, mask = _padded([row.token_ids for row in rows], pad, left=False)
    trained, _ = _padded([row.trained for row in rows], False, left=False)
    ids, mask, trained = (t.to(next(model.parameters()).device) for t in (ids, mask, trained.bool()))
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    wanted = trained[:, 1:]
    return (
        F.cross_entropy(logits[:, :-1][wanted].float(), ids[:, 1:][wanted], reduction="sum").item(),
        int(wanted.sum()),
    )


@torch.inference_mode()
def _generate(
    model: Any,  # PeftModel hands generate() on to a PreTrainedModel, which no type says
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    pad: int,
) -> list[str]:
    """Greedy continuations of one batch, padded on the left, as text."""
    ids, mask = (t.to(model.device) for t in _padded(prompts, pad, left=True))
    stops = model.generation_config.eos_token_id
    stops = {*(stops if isinstance(stops, list) else [stops]), tokenizer.eos_token_id} - {None}
    tokens = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        eos_token_id=sorted(stops),
        pad_token_id=pad,
    )
    return [_decode(tokenizer, row) for row in tokens[:, ids.shape[1] :].tolist()]


def _padded(rows: Sequence[Sequence[int]], fill: int, left: bool) -> tuple[Tensor, Tensor]:
    """([B, S] rows, [B, S] 1 where a row is, 0 on padding), both int64."""
    width = max(map(len, rows))
    values = torch.full((len(rows), width), fill, dtype=torch.long)
    mask = torch.zeros_like(values)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(len(row))
        values[i, where], mask[i, where] = torch.tensor(row), 1
    return values, mask


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert isinstance(text, str)
    return text.strip()


def _fitted(tokens: TokenizedExample, length: int) -> TokenizedExample:
    fitted = fit(tokens, length, "truncate")
    assert fitted is not None  # only overlong="drop" gives None
    return fitted


def _prompt_of(tokens: TokenizedExample) -> TokenizedExample:
    """The sample up to its last answer."""
    end = _answer_start(tokens)
    return TokenizedExample(
        tokens.token_ids[:end], tokens.trained[:end], starts_with_bos=tokens.starts_with_bos, source=tokens.source
    )


def _answer_start(tokens: TokenizedExample) -> int:
    """Index of the first token of the last answer, which ends the sample."""
    start = len(tokens.trained)
    while start > 0 and tokens.trained[start - 1]:
        start -= 1
    return start


def load_tasks(
    paths: Sequence[Path], tokenizer: PreTrainedTokenizerBase, max_samples: int | None
) -> Iterator[tuple[str, list[Example]]]:
    stems = [stem_of(path) for path in paths]
    for path, stem in zip(paths, stems, strict=True):
        name = stem if stems.count(stem) == 1 else str(path)
        examples = load_examples(TaskConfig(name=name, path=str(path)), tokenizer)[:max_samples]
        if not examples:
            raise DataError(f"{path}: holds no samples; name another file")
        yield name, examples


def _show(scores: dict[str, dict[str, Score]], console: Console) -> None:
    """Print the table: one row per task, one pair of columns per variant (before, after)."""
    variants = list(next(iter(scores.values())))
    table = Table()
    table.add_column("task", overflow="fold")
    table.add_column("samples", justify="right")
    for variant in variants:
        table.add_column(f"exact match {variant}".strip(), justify="right")
    for variant in variants:
        table.add_column(f"answer loss {variant}".strip(), justify="right")
    for task, by_variant in scores.items():
        results = by_variant.values()
        table.add_row(
            task,
            str(next(iter(results)).samples),
            *(f"{s.exact_match:.1%}" for s in results),
            *(f"{s.answer_loss:.4f}" for s in results),
        )
    console.print(table)
    for task, by_variant in scores.items():
        score = next(iter(by_variant.values()))
        if score.truncated:
            console.print(f"{task}: {score.truncated} of {score.samples} samples exceed the context: prompts were cut")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hf-model", type=path_argument, required=True, metavar="DIR", help="Hugging Face model")
    parser.add_argument("--adapter", type=path_argument, metavar="DIR", help="PEFT adapter directory")
    parser.add_argument("--data", type=path_argument, nargs="+", required=True, metavar="FILE", help="a file per task")
    parser.add_argument("--max-samples", type=_positive, metavar="N", help="only the first N samples of each task")
    parser.add_argument("--max-new-tokens", type=_positive, default=256, metavar="N", help="longest generated answer")
    parser.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="samples per forward pass")
    parser.add_argument("--json", type=path_argument, metavar="OUT", help="also write the scores as JSON")
    parser.add_argument("--compare", action="store_true", help="score the base without the adapter as well")
    return parser.parse_args()


@exit_on_user_error
def main() -> None:
    """Entry point of tools/evaluate.py."""
    arguments = _arguments()
    logging.disable_progress_bar()  # of loading weights: the scoring has its own
    if arguments.compare and arguments.adapter is None:
        raise ConfigError("--compare", True, "compares an adapter with its base", "name the adapter with --adapter DIR")
    if arguments.json is not None and not arguments.json.absolute().parent.is_dir():
        raise ConfigError("--json", str(arguments.json), "lies in no existing directory", "create it first")
    base, tokenizer = load_base(arguments.hf_model)
    model: Any = base if arguments.adapter is None else load_adapter(base, arguments.adapter)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    tasks = dict(load_tasks(arguments.data, tokenizer, arguments.max_samples))
    scores: dict[str, dict[str, Score]] = {}
    for task, examples in tasks.items():
        scores[task] = {}
        for variant in ("before", "after") if arguments.compare else ("",):
            with model.disable_adapter() if variant == "before" else contextlib.nullcontext():
                scores[task][variant] = evaluate(
                    model, tokenizer, examples, arguments.batch_size, arguments.max_new_tokens, f"{task} {variant}"
                )
    _show(scores, Console())
    if arguments.json is not None:
        report = {
            "hf_model": str(arguments.hf_model),
            "adapter": None if arguments.adapter is None else str(arguments.adapter),
            "tasks": {t: {variant or "score": asdict(s) for variant, s in by.items()} for t, by in scores.items()},
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
