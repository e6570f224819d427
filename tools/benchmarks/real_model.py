"""Tokens per second on a real model and real data: our trainer beside Hugging Face PEFT's LoRA, one process.

    python tools/benchmarks/real_model.py --hf-model DIR --data FILE ...

Contenders, at the ranks and on the projections of the paper (settings.py), each in float32 and in bfloat16, with a
sample per row and packed:

- peft8, peft64: LoRA of rank 8 and 64, a transformers model in a plain torch loop (peers.py)
- lora, molora, malora: malora_dist.train's Trainer

In bfloat16 the frozen base is bfloat16 and the adapters are float32, in PEFT too (its default,
`autocast_adapter_dtype`). A step is `--global-batch-size` samples in microbatches of `--micro-batch-size` rows, the
same samples for all, and the figure counts their tokens without padding. The plain loop gets its batches ready made and
no attention mask, which right padding does not need; packed rows come with the position ids that transformers finds
documents by. Everything else is as in peers.py: no dropout, no gradient checkpointing, AdamW, gradients clipped to
norm 1.

All contenders are in memory at once and take turns; ratios are taken round by round.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import headline, interleaved, print_table, ratios, spread, summary, write_results
from models import build_trainer
from peers import CLIP, IGNORED_LABEL, LEARNING_RATE, Batch, Contender, PlainLoop
from peft import LoraConfig, get_peft_model
from settings import SETTINGS
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from malora_dist.checkpoint.convert import import_hf
from malora_dist.data.batches import Microbatch
from malora_dist.parallel import topology as layout

SETTING = SETTINGS["paper"]
PEFT_RANKS = {"peft8": 8, "peft64": 64}
METHODS = ("lora", "molora", "malora")
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
#: What is compared: (numerator, denominator) of speeds.
RATIOS = (
    ("malora float32", "peft64 float32"),
    ("malora bf16", "peft64 bf16"),
    ("malora bf16 packed", "peft64 bf16 packed"),
    ("malora bf16 packed", "lora bf16 packed"),
    ("malora bf16 packed", "malora float32"),
)

#: Dtype and packing of a contender.
Way = tuple[str, bool]
WAYS: tuple[Way, ...] = tuple(itertools.product(DTYPES, (False, True)))


class OurTrainer(Contender):
    """malora_dist's Trainer; it makes its batches within the step."""

    def __init__(self, base: Path, method: str, way: Way, args: argparse.Namespace, topology: Any) -> None:
        dtype, packing = way
        self.trainer = build_trainer(
            [
                f"pretrained_checkpoint={base}",
                f"data=[{','.join(f'{{path: {str(file)!r}}}' for file in args.data)}]",
                *SETTING.overrides(method),
                f"bf16={str(dtype == 'bf16').lower()}",
                f"packing={str(packing).lower()}",
                f"seq_length={args.seq_length}",
                f"micro_batch_size={args.micro_batch_size}",
                f"global_batch_size={args.global_batch_size}",
                f"lr={LEARNING_RATE}",
                "lr_decay_style=constant",
                f"clip_grad={CLIP}",
                "eval_iters=0",
                "validation_samples=0",
                "device=cpu",
            ],
            topology,
        )
        super().__init__(self.trainer.trained.model)
        self.losses: list[float] = []

    def step(self) -> None:
        self.losses.append(self.trainer.train_step().losses.overall)


class AccumulatingLoop(PlainLoop):
    """PEFT on a transformers model; a step is several microbatches, the loss a mean over all their answers."""

    def __init__(self, model: nn.Module, steps: Sequence[Sequence[Batch]]) -> None:
        super().__init__(model, steps[0], lambda: 0.0)
        self.steps = itertools.cycle(steps)
        self.losses: list[float] = []

    def step(self) -> None:
        batches = next(self.steps)
        answers = sum(int((batch["labels"] != IGNORED_LABEL).sum()) for batch in batches)
        total = 0.0
        for batch in batches:
            loss = self.model(**batch, num_items_in_batch=answers).loss
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(total)


def as_batch(microbatch: Microbatch, packing: bool) -> Batch:
    """A microbatch as a transformers model takes it; labels are shifted already."""
    labels = microbatch.labels_BS.masked_fill(microbatch.loss_mask_BS == 0, IGNORED_LABEL)
    batch = {"input_ids": microbatch.tokens_BS, "labels": labels, "shift_labels": labels}
    return batch | ({"position_ids": microbatch.position_ids_BS} if packing else {})


def load_base(args: argparse.Namespace, dtype: str) -> PreTrainedModel:
    """The frozen model as transformers loads it."""
    model = AutoModelForCausalLM.from_pretrained(args.hf_model, attn_implementation="sdpa", dtype=DTYPES[dtype])
    model.config.use_cache = False
    return model.train().requires_grad_(False)


def with_lora(model: PreTrainedModel, rank: int) -> nn.Module:
    """The model with PEFT's LoRA on the setting's projections."""
    projections = list(SETTING.target_modules)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=projections, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def name_of(contender: str, way: Way) -> str:
    """As in the table."""
    return " ".join([contender, way[0], *(["packed"] if way[1] else [])])


def first_steps(base: Path, packing: bool, args: argparse.Namespace, topology: Any) -> list[list[Microbatch]]:
    """The microbatches of every step, as a trainer makes them."""
    batches = OurTrainer(base, "lora", ("bf16", packing), args, topology).trainer.batches
    return [batches.train(i * args.global_batch_size) for i in range(args.rounds + 1)]


def build(base: Path, args: argparse.Namespace) -> tuple[dict[str, Contender], list[int]]:
    """(contenders by name, tokens of each step)."""
    contenders: dict[str, Contender] = {}
    topology = None
    for way, method in itertools.product(WAYS, METHODS):
        name = name_of(method, way)
        if name in args.contenders:
            trainer = OurTrainer(base, method, way, args, topology)
            topology = trainer.trainer.topology
            contenders[name] = trainer
    steps = {packing: first_steps(base, packing, args, topology) for packing in (False, True)}
    for way, (contender, rank) in itertools.product(WAYS, PEFT_RANKS.items()):
        name = name_of(contender, way)
        if name in args.contenders:
            batches = [[as_batch(m, way[1]) for m in step] for step in steps[way[1]]]
            torch.manual_seed(0)
            contenders[name] = AccumulatingLoop(with_lora(load_base(args, way[0]), rank), batches)
    tokens = [sum(int((m.token_task_BS > 0).sum()) for m in step) for step in steps[False]]
    return contenders, tokens


def check_same_start(contenders: dict[str, Contender]) -> None:
    """All B are zero, so every contender's first step has the base's loss on the same samples.

    Raises:
        RuntimeError: one does not: it computes something else.
    """
    losses = {name: contender.losses[0] for name, contender in contenders.items()}  # type: ignore[attr-defined]
    for dtype, tolerance in (("float32", 1e-3), ("bf16", 2e-2)):
        own = {name: loss for name, loss in losses.items() if dtype in name}
        if max(own.values()) - min(own.values()) > tolerance:
            raise RuntimeError(f"the contenders do not start at the same loss: {own}")


def measure(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """{contender: seconds and tokens per second of each round, trainable parameters}."""
    with tempfile.TemporaryDirectory(prefix="malora-real-model-") as scratch:
        base = Path(scratch) / "base"
        import_hf(args.hf_model, base)
        try:
            contenders, tokens = build(base, args)
            timed = {name: contender.seconds for name, contender in contenders.items()}
            seconds = interleaved(timed, args.rounds, warmup=1)
            check_same_start(contenders)
        finally:
            layout.destroy()
    return {
        name: {
            "seconds": seconds[name],
            "tokens_per_second": [n / s for n, s in zip(tokens[1:], seconds[name], strict=True)],
            "trainable_parameters": contender.trainable,
        }
        for name, contender in contenders.items()
    }


def report(figures: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Print the table; summaries of the ratios of speeds."""
    speeds = {name: figure["tokens_per_second"] for name, figure in figures.items()}
    rows = []
    for name, speed in speeds.items():
        own = summary(speed)
        quartiles = f"{own['q1']:,.0f}-{own['q3']:,.0f}"
        trainable = f"{figures[name]['trainable_parameters']:,}"
        rows.append([name, f"{own['median']:,.0f}", quartiles, trainable])
    print_table(["", "tokens/s", "quartiles", "trainable"], rows)
    found = {f"{a}/{b}": ratios(speeds[a], speeds[b]) for a, b in RATIOS if {a, b} <= speeds.keys()}
    for name, ratio in found.items():
        print(f"{name}: {spread(ratio)}")
    return found


def parse() -> argparse.Namespace:
    """Options."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf-model", type=Path, required=True, help="a Hugging Face model of a supported family")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="files of a format that training reads")
    names = [name_of(*pair) for pair in itertools.product((*PEFT_RANKS, *METHODS), WAYS)]
    parser.add_argument("--contenders", nargs="+", choices=names, default=names, help="as in the table (default: all)")
    parser.add_argument("--seq-length", type=int, default=256, help="positions of a row (default: %(default)s)")
    parser.add_argument("--micro-batch-size", type=int, default=4, help="rows (default: %(default)s)")
    parser.add_argument("--global-batch-size", type=int, default=16, help="samples of a step (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each contender, after one of warm-up")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch; default: one per core")
    parser.add_argument("--output", type=Path, help="JSON file to write, another than results/real_model.json")
    return parser.parse_args()


def main() -> None:
    """Measure, print and write down."""
    args = parse()
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    figures = measure(args)
    found = report(figures)
    setting = {key: value for key, value in vars(args).items() if key not in ("output", "hf_model", "data")}
    setting |= {"model": args.hf_model.name, "data": [file.name for file in args.data]}
    packages = ("megatron-core", "transformers", "peft")
    write_results(__file__, {"setting": setting, "contenders": figures, "ratios": found}, *packages, output=args.output)
    headline(**{name.replace(" ", "_"): ratio["median"] for name, ratio in found.items()})


if __name__ == "__main__":
    main()
