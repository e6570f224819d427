"""Tokens per second and peak memory of our trainer and our PEFT tuner beside other ways to train the same Llama.

    python tools/benchmarks/peers.py

Five contenders train on the same random Llama and the same samples, at the ranks and on the projections of a setting
(settings.py; default: the paper's, in which all train about as many parameters):

- base: the frozen model alone, forward and backward to its embedded tokens; the reference, it learns nothing
- peft_lora: Hugging Face PEFT, one LoRA, in a plain torch loop
- loop_molora: 8 LoRA experts, top-2, computed one expert after the other, in the same loop
- tuner: malora_dist.hf, MALoRA with 8 experts, top-2, in the same loop
- trainer: malora_dist.train's Trainer on megatron-core, the same MALoRA, one process

Half of the positions have a loss (`--answers`), the others are prompt: of gsm8k's tokens 58% are answers, of Code
Alpaca's 47%, of the commonsense sets' 6 to 9%. The trainer makes no logits for prompts, Hugging Face's models make all.
`--vocab 1024 --answers 1` takes that away and leaves the adapters.

Alike for all: float32, scaled_dot_product_attention, no padding, no dropout, no gradient checkpointing, one microbatch
per step, the same loss positions, cross-entropy over the whole vocabulary in float32, AdamW without weight decay,
gradients clipped to norm 1, all cores. Router and load-balancing loss in every mixture. Checked before timing: all
start at the same loss. The plain loop uses torch's fused AdamW, as transformers' Trainer does, and gets its batches
ready made; the trainer makes its own within the step.

Steps are interleaved, ratios are taken pair by pair. Memory: the resident memory of a fresh process at its highest
during two steps, above that before the first of them: activations, gradients and optimizer, without the base. There
glibc returns freed blocks of 128 KB and more at once: what it would keep of them varies by a fifth from run to run, and
is more than what tells the contenders apart. Linux only.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import headline, interleaved, print_table, ratios, summary, write_results
from models import Inputs, build_trainer, llama_like, peak_memory, spawn, write_inputs
from peft import LoraConfig, get_peft_model
from settings import SETTINGS, Setting
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.utils import logging

from malora_dist.hf import MaloraConfig
from malora_dist.methods.spec import AdapterSpec
from malora_dist.parallel import topology as layout

LEARNING_RATE, CLIP = 3e-4, 1.0
IGNORED_LABEL = -100

#: What a Hugging Face model is called with.
Batch = dict[str, Tensor]


class LoopMolora(nn.Module):
    """MoLoRA as single-GPU code writes it: for each expert, pick its tokens, run its LoRA, add the result in place.

    Attributes:
        balance: load-balancing loss of the last forward pass, with its coefficient.
    """

    balance: Tensor

    def __init__(self, base: nn.Linear, spec: AdapterSpec) -> None:
        super().__init__()
        self.base, self.spec = base, spec
        n, m, r = base.in_features, base.out_features, spec.declared.rank
        self.router = nn.Linear(n, spec.num_lora_experts, bias=False)
        self.down = nn.ModuleList(nn.Linear(n, r, bias=False) for _ in range(spec.num_lora_experts))
        self.up = nn.ModuleList(nn.Linear(r, m, bias=False) for _ in range(spec.num_lora_experts))
        for weight in self.up.parameters():
            nn.init.zeros_(weight)

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, sequence, n] -> [batch, sequence, m]."""
        tokens = x.flatten(0, 1)
        probs = self.router(tokens).softmax(dim=-1)
        gates, experts = probs.topk(self.spec.topk, dim=-1)
        gates = gates / gates.sum(dim=-1, keepdim=True)
        delta = tokens.new_zeros(len(tokens), self.base.out_features)
        for e, (down, up) in enumerate(zip(self.down, self.up, strict=True)):
            chosen, slot = torch.where(experts == e)
            delta.index_add_(0, chosen, up(down(tokens[chosen])) * gates[chosen, slot, None])
        share = experts.flatten().bincount(minlength=len(self.up)) / experts.numel()
        self.balance = self.spec.aux_loss_coeff * len(self.up) * (share * probs.mean(dim=0)).sum()
        return self.base(x) + self.spec.declared.scaling * delta.view(*x.shape[:-1], -1)


def load_base(inputs: Inputs) -> LlamaForCausalLM:
    """The frozen Llama."""
    logging.disable_progress_bar()
    model = LlamaForCausalLM.from_pretrained(inputs.hf, attn_implementation="sdpa", dtype=torch.float32)
    model.config.use_cache = False
    return model.train().requires_grad_(False)


def with_loop_molora(base: LlamaForCausalLM, spec: AdapterSpec) -> LlamaForCausalLM:
    """The Llama with a LoopMolora in place of every adapted projection."""
    for layer in base.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name in spec.projections:
                if hasattr(parent, name):
                    setattr(parent, name, LoopMolora(getattr(parent, name), spec))
    return base


class Contender:
    """One way of training, on its own copy of the model."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        parameters = [p for module in modules for p in module.parameters()]
        self.trainable = sum(p.numel() for p in parameters if p.requires_grad)
        for p in parameters:
            p.sum()  # safetensors maps weights from their file: have them in memory before memory is measured

    def step(self) -> None:
        """One optimizer step on the next batch."""
        raise NotImplementedError

    def start_loss(self) -> float:
        """The language-model loss of the first batch, before any step; it may take that step."""
        raise NotImplementedError

    def seconds(self) -> float:
        """Of one step."""
        started = time.perf_counter()
        self.step()
        return time.perf_counter() - started

    def peak_memory(self) -> int:
        """Bytes of the first two steps; later ones need no more."""

        def two_steps() -> None:
            self.step()
            self.step()

        return peak_memory(two_steps, torch.device("cpu"))


class PlainLoop(Contender):
    """A Hugging Face model in a plain torch loop.

    Args:
        balance: what joins the loss after a forward pass, if the model does not do that itself.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], balance: Callable[[], Tensor | float]) -> None:
        super().__init__([model])
        self.model, self.balance = model, balance
        self.first, self.batches = batches[0], itertools.cycle(batches)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def step(self) -> None:
        loss = self.model(**next(self.batches)).loss + self.balance()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def start_loss(self) -> float:
        self.model.eval()  # our tuner adds the load-balancing loss in training mode only
        with torch.no_grad():
            loss = self.model(**self.first).loss.item()
        self.model.train()
        return loss


class FrozenBase(Contender):
    """Forward and backward to the embedded tokens."""

    def __init__(self, model: LlamaForCausalLM, batches: Sequence[Batch]) -> None:
        super().__init__([model])
        self.model, self.first, self.batches = model, batches[0], itertools.cycle(batches)

    def _loss(self, batch: Batch) -> Tensor:
        embedded = self.model.get_input_embeddings()(batch["input_ids"]).requires_grad_()
        return self.model(**(batch | {"input_ids": None, "inputs_embeds": embedded})).loss

    def step(self) -> None:
        self._loss(next(self.batches)).backward()

    def start_loss(self) -> float:
        return self._loss(self.first).item()


class OurTrainer(Contender):
    """malora_dist's Trainer; it also makes its batches, which the others copy."""

    def __init__(self, inputs: Inputs, setting: Setting, micro_batch_size: int) -> None:
        adapter = setting.overrides("malora")
        loop = [f"lr={LEARNING_RATE}", "lr_decay_style=constant", f"clip_grad={CLIP}", "device=cpu"]
        sizes = {"micro_batch_size": micro_batch_size, "global_batch_size": micro_batch_size}
        self.trainer = build_trainer(inputs.overrides(*adapter, *loop, **sizes))
        super().__init__(self.trainer.trained.model)

    def step(self) -> None:
        self.trainer.train_step()

    def start_loss(self) -> float:
        return self.trainer.train_step().losses.overall

    def batches(self, count: int) -> list[Batch]:
        """The first microbatches as a Hugging Face model takes them; labels are shifted already."""
        found = []
        for i in range(count):
            (microbatch,) = self.trainer.batches.train(i * self.trainer.config.global_batch_size)
            assert bool((microbatch.token_task_BS > 0).all()), "the other contenders know no padding"
            labels = microbatch.labels_BS.masked_fill(microbatch.loss_mask_BS == 0, IGNORED_LABEL)
            found.append({"input_ids": microbatch.tokens_BS, "labels": labels, "shift_labels": labels})
        return found


def make_contender(name: str, inputs: Inputs, setting: Setting, batches: Sequence[Batch]) -> Contender:
    """A contender by its name in the table.

    Raises:
        KeyError: no such contender.
    """
    torch.manual_seed(0)
    if name == "trainer":
        return OurTrainer(inputs, setting, len(batches[0]["labels"]))
    base = load_base(inputs)
    if name == "base":
        return FrozenBase(base, batches)
    if name == "loop_molora":
        model = with_loop_molora(base, setting.spec("molora"))
        loops = [module for module in model.modules() if isinstance(module, LoopMolora)]
        return PlainLoop(model, batches, lambda: torch.stack([loop.balance for loop in loops]).sum())
    lora = setting.spec("lora")
    config = {
        "peft_lora": LoraConfig(
            r=lora.declared.rank,
            lora_alpha=int(lora.declared.alpha),
            target_modules=list(lora.projections),
            task_type="CAUSAL_LM",
        ),
        "tuner": MaloraConfig(task_type="CAUSAL_LM", **setting.keys("malora")),
    }[name]
    return PlainLoop(get_peft_model(base, config), batches, lambda: 0.0)


CONTENDERS = ("base", "peft_lora", "loop_molora", "tuner", "trainer")


def check_same_start(contenders: dict[str, Contender]) -> None:
    """All B are zero, so every contender starts at the base's loss on the same batch.

    Raises:
        RuntimeError: one does not: it computes something else.
    """
    losses = {name: contender.start_loss() for name, contender in contenders.items()}
    if max(losses.values()) - min(losses.values()) > 1e-4:
        raise RuntimeError(f"the contenders do not start at the same loss: {losses}")


def peak_in_own_process(name: str, inputs: Inputs, setting: Setting, batches: Sequence[Batch], threads: int) -> int:
    """Bytes, see :func:`models.peak_memory`."""
    with spawn(partial(make_contender, name, inputs, setting, batches), 1, threads, for_memory=True) as process:
        (peak,) = process.call("peak_memory")
    return peak


def measure(
    inputs: Inputs, setting: Setting, micro_batch_size: int, rounds: int, threads: int
) -> dict[str, dict[str, Any]]:
    """{contender: seconds of each round, peak bytes, trainable parameters}."""
    trainer = OurTrainer(inputs, setting, micro_batch_size)
    try:
        batches = trainer.batches(8)
        contenders: dict[str, Contender] = {
            name: make_contender(name, inputs, setting, batches) for name in CONTENDERS if name != "trainer"
        } | {"trainer": trainer}
        check_same_start(contenders)
        seconds = interleaved({name: contender.seconds for name, contender in contenders.items()}, rounds, warmup=2)
    finally:
        layout.destroy()
    trainable = {name: contender.trainable for name, contender in contenders.items()}
    del trainer, contenders  # room for the processes below
    peaks = {name: peak_in_own_process(name, inputs, setting, batches, threads) for name in CONTENDERS}
    return {
        name: {"seconds": seconds[name], "peak_bytes": peaks[name], "trainable_parameters": trainable[name]}
        for name in CONTENDERS
    }


def parse() -> argparse.Namespace:
    """Options; the default takes about three minutes on two cores."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=SETTINGS, default="paper", help="ranks and projections (default: paper)")
    parser.add_argument("--hidden", type=int, default=512, help="width of the model")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=32000, help="Llama 2's (default: %(default)s)")
    parser.add_argument("--answers", type=float, default=0.5, help="share of the positions with a loss")
    parser.add_argument("--tokens", type=int, default=512, help="per sequence")
    parser.add_argument("--micro-batch-size", type=int, default=4, help="sequences per step")
    parser.add_argument("--rounds", type=int, default=12, help="timed steps of each contender")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch; default: one per core")
    parser.add_argument("--output", type=Path, help="JSON file to write, another than results/peers.json")
    return parser.parse_args()


def report(figures: dict[str, dict[str, Any]], tokens_per_step: int) -> dict[str, dict[str, float]]:
    """Print the table and add its figures to `figures`; the headline's ratios, of speeds or, where named so, steps."""
    seconds = {name: figure["seconds"] for name, figure in figures.items()}
    rows = []
    for name, figure in figures.items():
        figure["tokens_per_second"] = speed = summary([tokens_per_step / s for s in seconds[name]])
        figure["step_over_base"] = base = ratios(seconds[name], seconds["base"])
        figure["step_over_peft_lora"] = lora = ratios(seconds[name], seconds["peft_lora"])
        rows.append([
            name, f"{speed['median']:,.0f}", f"{speed['q1']:,.0f}-{speed['q3']:,.0f}", f"{base['median']:.2f}",
            f"{lora['median']:.2f}", f"{lora['q1']:.2f}-{lora['q3']:.2f}", f"{figure['peak_bytes'] / 1e6:,.0f}",
            f"{figure['trainable_parameters']:,}",
        ])  # fmt: skip
    print_table(["", "tokens/s", "quartiles", "step/base", "step/peft_lora", "quartiles", "peak MB", "trainable"], rows)
    return {
        "trainer/peft_lora": ratios(seconds["peft_lora"], seconds["trainer"]),
        "trainer/loop_molora": ratios(seconds["loop_molora"], seconds["trainer"]),
        "tuner_step/peft_lora_step": ratios(seconds["tuner"], seconds["peft_lora"]),
    }


def main() -> None:
    """Measure, print and write down."""
    args = parse()
    torch.set_num_threads(args.threads)
    config = llama_like(args.hidden, args.layers, args.vocab, head_dim=64)
    with tempfile.TemporaryDirectory(prefix="malora-peers-") as scratch:
        inputs = write_inputs(Path(scratch), config, args.tokens, answers=args.answers)
        figures = measure(inputs, SETTINGS[args.setting], args.micro_batch_size, args.rounds, args.threads)

    ratio_of = report(figures, args.micro_batch_size * args.tokens)
    setting = {key: value for key, value in vars(args).items() if key != "output"}
    packages = ("megatron-core", "transformers", "peft")
    write_results(
        __file__, {"setting": setting, "contenders": figures, "ratios": ratio_of}, *packages, output=args.output
    )
    headline(**{name: ratio["median"] for name, ratio in ratio_of.items()})


if __name__ == "__main__":
    main()
