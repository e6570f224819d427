"""Make what the quickstart starts from: task files and, unless the data is yours, a small Llama as the base.

    python tools/make_quickstart.py --out runs/quickstart
    python tools/make_quickstart.py --out runs/mine --data FILE...

The first writes OUT/data/{train,validation}/NAME.jsonl for six tasks, and OUT/base, a Hugging Face
Llama directory trained here on other skills than the tasks (malora_dist/data/synthetic.py). The
number of steps is fixed, so that the same seed gives the same base; on one CPU core they take about
a minute. A base made before by the same recipe is kept.

The second only splits each of your files: up to 64 records, at most a fifth, are held
out for validation, so that the quickstart's table is about records the training did not see.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from malora_dist.data.records import read_records
from malora_dist.data.schedule import keyed_permutation
from malora_dist.data.synthetic import Sample, base_samples, write_split, write_tasks
from malora_dist.errors import DataError, exit_on_user_error
from malora_dist.files import path_argument, stem_of

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")  # with the 256 bytes an even vocabulary, which TP=2 and 4 divide


@dataclass(frozen=True)
class Recipe:
    """All that decides the base's weights, up to rounding that differs between machines."""

    seed: int
    steps: int
    batch_size: int = 64
    lr: float = 2e-3
    warmup_steps: int = 50
    hidden_size: int = 128
    intermediate_size: int = 352
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    rope_theta: float = 100.0  # the texts are short: positions a few bytes apart have to differ clearly
    max_length: int = 256


def build_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """One token per byte; BOS in front, as Llama's own."""
    symbols = (*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", SPECIAL_TOKENS.index("<s>"))]
    )
    pad, bos, eos, unk = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unk,
        model_max_length=max_length,
    )


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with grouped-query attention and random weights."""
    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden_size,
            intermediate_size=recipe.intermediate_size,
            num_hidden_layers=recipe.num_layers,
            num_attention_heads=recipe.num_heads,
            num_key_value_heads=recipe.num_kv_heads,
            max_position_embeddings=recipe.max_length,
            rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
            initializer_range=0.05,  # the usual 0.02 is for wide models; this narrow one learns faster with more
            tie_word_embeddings=False,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def encode(samples: list[Sample], tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, int64 [samples, longest]; the labels of prompt and padding are -100."""
    prompts = tokenizer([s.prompt for s in samples]).input_ids
    answers = tokenizer([s.completion for s in samples], add_special_tokens=False).input_ids
    rows = [prompt + answer + [tokenizer.eos_token_id] for prompt, answer in zip(prompts, answers, strict=True)]
    length = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows])
    labels = torch.full_like(ids, -100)
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        labels[i, len(prompt) : len(row)] = ids[i, len(prompt) : len(row)]
    return ids, labels


def lr_factor(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine down to a twentieth."""
    return min((step + 1) / recipe.warmup_steps, max(0.05, 0.5 * (1 + math.cos(math.pi * step / recipe.steps))))


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> None:
    """Teach the model the base skills, the loss being on the answers alone. Prints its progress."""
    samples = base_samples(recipe.steps * recipe.batch_size, recipe.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.01)
    began = time.monotonic()
    model.train()
    for step in range(recipe.steps):
        ids, labels = encode(samples[step * recipe.batch_size : (step + 1) * recipe.batch_size], tokenizer)
        optimizer.param_groups[0]["lr"] = recipe.lr * lr_factor(step, recipe)
        # Rows end in padding, which causal attention keeps out of the tokens before it: no mask is needed.
        logits = model(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0 or step + 1 == recipe.steps:
            seconds = time.monotonic() - began
            print(f"base: step {step + 1:4d}/{recipe.steps}, loss {loss.item():.3f}, {seconds:.0f} s", flush=True)


def make_base(folder: Path, recipe: Recipe) -> None:
    """Train the base and save it, unless ``folder`` holds one made by the same recipe."""
    stamp = folder / "recipe.json"
    wanted = json.dumps(dataclasses.asdict(recipe), indent=1)
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        print(f"base: {folder} was made before by the same recipe; delete it to make it anew", flush=True)
        return
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer = build_tokenizer(recipe.max_length)
    model = build_model(recipe, tokenizer)
    print(f"base: training a Llama of {model.num_parameters():,} parameters on {recipe.steps} batches", flush=True)
    train(model, tokenizer, recipe)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    stamp.write_text(wanted, encoding="utf-8")  # last, so that an interrupted run leaves no base that looks whole


def split_files(files: Sequence[Path], folder: Path, seed: int) -> list[Path]:
    """Write each file as ``train/STEM.jsonl`` and ``validation/STEM.jsonl``; returns the training files.

    Raises:
        DataError: a file that cannot be read or has a single record, or two files of one name.
    """
    written: dict[str, Path] = {}
    for file in files:
        name = stem_of(file)
        if name in written:
            raise DataError(f"{file}: another file is named {name} too; rename one, the name is the task's name")
        records = [record for _, record in read_records(str(file))]
        if len(records) < 2:
            raise DataError(f"{file}: has one record; training and validation need at least one each")
        held_out = max(1, min(64, len(records) // 5))
        order = keyed_permutation(len(records), seed, "quickstart", name).tolist()
        train, validation = ([records[i] for i in sorted(part)] for part in (order[held_out:], order[:held_out]))
        written[name] = write_split(folder, name, train, validation)
    return list(written.values())


@exit_on_user_error
def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=path_argument, required=True, metavar="DIR", help="where data/ and base/ are written"
    )
    parser.add_argument("--data", type=path_argument, nargs="+", metavar="FILE", help="split these and make no base")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--steps", type=int, default=350, help="training steps of the base (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="of the base (default: %(default)s)")
    args = parser.parse_args()
    data = args.out / "data"
    files = split_files(args.data, data, args.seed) if args.data else write_tasks(data, args.seed)
    print(f"data: {len(files)} tasks ({', '.join(stem_of(file) for file in files)}) in {data}", flush=True)
    if not args.data:
        logging.disable_progress_bar()  # the model is one small file
        make_base(args.out / "base", Recipe(seed=args.seed, steps=args.steps, num_layers=args.layers))


if __name__ == "__main__":
    main()
