"""Step time of LoRA, asymmetric LoRA, MoLoRA and MALoRA on the same Llama, as ratios beside their FLOP floors.

    python tools/benchmarks/step_time.py
    python tools/benchmarks/step_time.py --device cuda --bf16 --shape llama3-8b --layers 2 --tokens 8192
    python tools/benchmarks/step_time.py --experts 8,512 --shape llama3-8b --vocab 1024 --tokens 8192 --compute grouped
    python tools/benchmarks/step_time.py --forms

A step is Trainer.train_step: forward, backward, gradient clipping and the optimizer, of a random Llama with Llama 2's
proportions or a released model's layers. The trainers of all methods are in memory at once and take turns; ratios are
formed round by round. MoLoRA runs in three forms: the usual token dispatch, in FastMoE's order of operations
(``molora``, see usual_dispatch.py); our grouped form, which is that without its avoidable passes; and the gated block.

Two floors stand beside a ratio: that of the whole step, from flops.py (frozen linears, attention, output layer and
adapters, forward and backward), and that of one square linear of the hidden size, which for MALoRA's gated block is
[2 + 3 (d + N + N r')/h + 3 N r' d/h^2] / [2 + 6 r/h]. Norms, activations and the optimizer are in no floor.

Peak memory is what two steps need above the built model, each method in a process of its own.

--experts: step time over N at fixed k, relative to the first N, with a router per projection and with
fuse_projections. In every form the routers grow with N (in the floor), and so does what is done once a step to every
parameter: zeroing, adding and clipping gradients, and the optimizer (not in the floor).
--forms: where the gated block and the grouped form of one adapter cost the same, beside the rule of
``expert_compute: auto``.

Results: tools/benchmarks/results/step_time.json, step_time_experts.json, step_time_forms.json.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import RESULTS, headline, interleaved, print_table, ratios, summary, write_results
from flops import Form, projection_widths, square_macs, step_flops
from forms import measure_forms, now
from models import Inputs, build_trainer, llama_config, llama_like, peak_memory, spawn, write_inputs
from transformers import LlamaConfig
from usual_dispatch import dispatch_as_usual

from malora_dist.config_file import load_config
from malora_dist.families.shapes import SHAPES
from malora_dist.kernels.experts import choose_expert_compute
from malora_dist.methods.budget import trainable_parameters
from malora_dist.methods.spec import AdapterSpec
from malora_dist.parallel import topology as layout
from malora_dist.parallel.device import choose_device

METHODS = {
    "lora": ["method=lora"],
    "asymmetric_lora": ["method=asymmetric_lora"],
    "molora": ["method=molora", "expert_compute=grouped"],
    "molora_grouped": ["method=molora", "expert_compute=grouped"],
    "molora_gated_block": ["method=molora", "expert_compute=gated_block"],
    "malora": ["method=malora"],
}
MOLORA = ("molora", "molora_grouped", "molora_gated_block")
USUAL = "molora"  # the one that gets dispatch_as_usual
FORMS: tuple[Form, ...] = ("gated_block", "grouped")


class Stopwatch:
    """A function that notes how long each call of it takes."""

    def __init__(self, function: Callable[..., Any], device: torch.device) -> None:
        self._function, self._device = function, device
        self.seconds: list[float] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        began = now(self._device)
        result = self._function(*args, **kwargs)
        self.seconds.append(now(self._device) - began)
        return result

    def run(self) -> float:
        """Call it; the seconds."""
        self()
        return self.seconds[-1]


class StepSeconds(NamedTuple):
    """Of every round."""

    step: list[float]
    optimizer: list[float]

    @property
    def rest(self) -> list[float]:
        """Forward and backward."""
        return [step - optimizer for step, optimizer in zip(self.step, self.optimizer, strict=True)]


class Bench:
    """Trainers of one model that take turns.

    Args:
        directory: where the Llama and its samples are written.
        hf: config of that Llama.
    """

    def __init__(self, directory: Path, hf: LlamaConfig, args: argparse.Namespace) -> None:
        self.hf, self.tokens, self.seq_length = hf, args.tokens, args.seq_length
        self.device = choose_device(args.device)
        self._keys = [f"device={self.device.type}"]
        dtype = torch.bfloat16 if args.bf16 else torch.float32
        self._inputs: Inputs = write_inputs(directory, hf, args.seq_length, dtype)

    def overrides(self, keys: Sequence[str]) -> list[str]:
        """All config keys of a run with these."""
        rows = self.tokens // self.seq_length
        return self._inputs.overrides(*self._keys, *keys, micro_batch_size=rows, global_batch_size=rows)

    def floor(self, keys: Sequence[str]) -> float:
        """Operations of a step with these config keys."""
        config = load_config(None, keys)
        form = form_of(config, config.expert_compute, self.device)
        return step_flops(self.hf, config, form, self.tokens, self.seq_length)

    def step_seconds(self, runs: Mapping[str, Sequence[str]], rounds: int) -> dict[str, StepSeconds]:
        """{name: each round's seconds} of trainers with these config keys, all in memory at once."""
        trainers: dict[str, Any] = {}
        try:
            for name, keys in runs.items():
                first = next(iter(trainers.values()), None)
                trainers[name] = build_trainer(self.overrides(keys), first and first.topology)
                if name == USUAL:
                    dispatch_as_usual(trainers[name])
            optimizers = {name: Stopwatch(t.trained.optimizer.step, self.device) for name, t in trainers.items()}
            for name, trainer in trainers.items():
                trainer.trained.optimizer.step = optimizers[name]
            steps = {name: Stopwatch(t.train_step, self.device).run for name, t in trainers.items()}
            seconds = interleaved(steps, rounds)
            return {name: StepSeconds(seconds[name], optimizers[name].seconds[-rounds:]) for name in runs}
        finally:
            trainers.clear()
            gc.collect()
            layout.destroy()


class MemoryProbe:
    """Lives in a process of its own."""

    def peak_bytes(self, overrides: list[str], as_usual: bool) -> int:
        """Bytes that two steps need above the built model: activations, gradients, optimizer state, workspaces."""
        trainer = build_trainer(overrides)
        if as_usual:
            dispatch_as_usual(trainer)
        return peak_memory(lambda: [trainer.train_step() for _ in range(2)], trainer.topology.device)


def form_of(spec: AdapterSpec, expert_compute: str, device: torch.device) -> Form:
    """The form that the experts of every adapter are computed in."""
    if expert_compute == "auto":
        expert_compute = choose_expert_compute(spec.num_experts, spec.topk, spec.expert_rank, device.type)
    return "grouped" if expert_compute == "grouped" else "gated_block"


def compare_methods(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """{method: figures}."""
    seconds = bench.step_seconds(METHODS, args.rounds)
    width = bench.hf.hidden_size
    lora = load_config(None, METHODS["lora"])
    figures: dict[str, Any] = {}
    for name, keys in METHODS.items():
        spec = load_config(None, keys)
        form = form_of(spec, spec.expert_compute, bench.device)
        figures[name] = {
            "form": form if spec.is_mixture else None,
            "seconds": summary(seconds[name].step),
            "optimizer_seconds": summary(seconds[name].optimizer),
            "to_lora": ratios(seconds[name].step, seconds["lora"].step),
            "floor": bench.floor(keys) / bench.floor(METHODS["lora"]),
            "square_floor": square_macs(spec, width, form) / square_macs(lora, width, form),
            "flop_per_second": bench.floor(keys) / summary(seconds[name].step)["median"],
        }
        if args.memory:
            with spawn(MemoryProbe, 1, args.threads, for_memory=True) as probe:
                (figures[name]["peak_bytes"],) = probe.call("peak_bytes", bench.overrides(keys), name == USUAL)
    for name in MOLORA:
        figures[name]["to_malora"] = ratios(seconds[name].step, seconds["malora"].step)
    return figures


def print_methods(figures: Mapping[str, Any]) -> dict[str, float]:
    """The table of one model, and its headline ratios."""
    rows = [
        (
            name,
            f"{f['seconds']['median'] * 1e3:.0f}",
            spread(f["to_lora"]),
            f"{f['floor']:.3f}",
            f"{f['to_lora']['median'] / f['floor']:.3f}",
            f"{f['square_floor']:.3f}",
            f"{f['peak_bytes'] / 1e6:.0f}" if "peak_bytes" in f else "-",
            f"{f['peak_bytes'] / figures['lora']['peak_bytes']:.2f}" if "peak_bytes" in f else "-",
        )
        for name, f in figures.items()
    ]
    header = (
        "method",
        "ms",
        "/ lora [quartiles]",
        "floor",
        "over floor",
        "floor of a square linear",
        "MB",
        "MB / lora",
    )
    print_table(header, rows)
    malora = figures["malora"]
    keys = {
        "malora/lora": malora["to_lora"]["median"],
        "floor": malora["floor"],
    }
    keys |= {f"{name}/malora": figures[name]["to_malora"]["median"] for name in MOLORA}
    if "peak_bytes" in malora:
        keys["memory_malora/lora"] = malora["peak_bytes"] / figures["lora"]["peak_bytes"]
    return keys


def compare_experts(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """{"form" or "form fused": {N: figures}}; ``auto`` repeats the figures of the form that its rule takes."""
    first = args.experts[0]
    figures: dict[str, Any] = {}
    for fused in (False, True):
        common = ["method=malora", f"fuse_projections={str(fused).lower()}"]
        runs = {
            (form, n): [*common, f"num_lora_experts={n}", f"expert_compute={form}"]
            for form in args.compute
            for n in args.experts
        }
        seconds = bench.step_seconds({f"{form} {n}": keys for (form, n), keys in runs.items()}, args.rounds)
        for row in (*args.compute, *(("auto",) if len(args.compute) == len(FORMS) else ())):
            of_n = {}
            for n in args.experts:
                configs = {m: load_config(None, runs[args.compute[0], m]) for m in (first, n)}
                spec = configs[n]
                chosen = {m: form_of(config, row, bench.device) for m, config in configs.items()}
                own, least = seconds[f"{chosen[n]} {n}"], seconds[f"{chosen[first]} {first}"]
                parameters = trainable_parameters(spec, projection_widths(bench.hf), bench.hf.num_hidden_layers)
                of_n[n] = {
                    "form": chosen[n],
                    "trainable_parameters": sum(parameters.values()),
                    "seconds": summary(own.step),
                    "optimizer_seconds": summary(own.optimizer),
                    "ratio": ratios(own.step, least.step),
                    "ratio_without_optimizer": ratios(own.rest, least.rest),
                    "floor": bench.floor(runs[chosen[n], n]) / bench.floor(runs[chosen[first], first]),
                }
            figures[f"{row} fused" if fused else row] = of_n
    return figures


def print_experts(figures: Mapping[str, Any]) -> dict[str, float]:
    """The table over N, and its headline ratios: the last N to the first."""
    rows = [
        (
            row,
            n,
            f["form"],
            f"{f['trainable_parameters'] / 1e6:.2f}",
            f"{f['seconds']['median'] * 1e3:.0f}",
            f"{f['optimizer_seconds']['median'] * 1e3:.0f}",
            spread(f["ratio"]),
            f"{f['ratio_without_optimizer']['median']:.3f}",
            f"{f['floor']:.3f}",
        )
        for row, of_n in figures.items()
        for n, f in of_n.items()
    ]
    first, *_, last = next(iter(figures.values()))
    ratio = f"/ N={first} [quartiles]"
    header = ("expert_compute", "N", "form", "M params", "ms", "optimizer ms", ratio, "without optimizer", "floor")
    print_table(header, rows)
    keys: dict[str, float] = {}
    for row, of_n in figures.items():
        name = row.replace(" ", "_")
        keys |= {
            f"{name}_{last}/{first}": of_n[last]["ratio"]["median"],
            f"{name}_without_optimizer": of_n[last]["ratio_without_optimizer"]["median"],
        }
    return keys


def spread(ratio: Mapping[str, float]) -> str:
    """Median and quartiles of a ratio."""
    return f"{ratio['median']:.3f} [{ratio['q1']:.3f} {ratio['q3']:.3f}]"


def numbers(text: str) -> list[int]:
    """Of a comma-separated list."""
    return [int(part) for part in text.split(",")]


def names(text: str) -> list[str]:
    """Of a comma-separated list of forms.

    Raises:
        ValueError: no such form.
    """
    return [FORMS[FORMS.index(part)] for part in text.split(",")]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=numbers, default=[2048, 4096], help="hidden sizes (default: 2048,4096)")
    parser.add_argument(
        "--shape", choices=SHAPES, help="layers and vocabulary of a released model, instead of --hidden"
    )
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--vocab", type=int, help="default: the shape's, or 1024")
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=1024, help="of a step (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="steps of every method after one of warm-up")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch (default: all cores)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu")
    parser.add_argument("--bf16", action="store_true", help="frozen base and computation in bfloat16")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave the peak memory out")
    parser.add_argument("--experts", type=numbers, help="step time over these N instead")
    parser.add_argument("--compute", type=names, default=FORMS, help="with --experts: which forms (default: both)")
    parser.add_argument("--forms", action="store_true", help="crossover of the two forms of one adapter instead")
    parser.add_argument("--output", type=Path, help="another JSON file to write")
    args = parser.parse_args()
    if args.tokens % args.seq_length:
        parser.error(f"--tokens {args.tokens} must be a multiple of --seq-length {args.seq_length}")
    if args.experts and len(args.experts) < 2:
        parser.error("--experts needs at least two numbers")
    return args


def models_of(args: argparse.Namespace) -> dict[str, LlamaConfig]:
    """{label: the Llama} to measure."""
    if args.shape:
        shape = SHAPES[args.shape] | {"layers": args.layers} | ({"vocab": args.vocab} if args.vocab else {})
        return {args.shape: llama_config(**shape)}
    return {str(hidden): llama_like(hidden, args.layers, args.vocab or 1024) for hidden in args.hidden}


def measure_model(hf: LlamaConfig, args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, float]]:
    """(figures, headline ratios) of one Llama, its table printed."""
    with tempfile.TemporaryDirectory(prefix="malora-step-time-") as scratch:
        bench = Bench(Path(scratch), hf, args)
        print(
            f"\nhidden {hf.hidden_size}, ffn {hf.intermediate_size}, layers {hf.num_hidden_layers}, "
            f"vocabulary {hf.vocab_size}, {args.tokens} tokens in sequences of {args.seq_length}, "
            f"{'bfloat16' if args.bf16 else 'float32'} on {bench.device.type}, {args.threads} threads",
            flush=True,
        )
        if args.experts:
            figures = compare_experts(bench, args)
            return figures, print_experts(figures)
        figures = compare_methods(bench, args)
        return figures, print_methods(figures)


def main() -> None:
    """Measure, print and write down."""
    args = parse()
    torch.set_num_threads(args.threads)
    keys: dict[str, float | str] = {}
    figures: dict[str, Any] = {}
    if args.forms:
        for hidden in args.hidden:
            figures[str(hidden)], crossovers = measure_forms(
                hidden,
                args.tokens,
                args.rounds,
                choose_device(args.device),
                torch.bfloat16 if args.bf16 else torch.float32,
            )
            keys |= {f"{key}@{hidden}": value for key, value in crossovers.items()}
    else:
        models = models_of(args)
        for label, hf in models.items():
            figures[label], found = measure_model(hf, args)
            keys |= {f"{key}@{label}" if len(models) > 1 else key: value for key, value in found.items()}
    mode = "_forms" if args.forms else "_experts" if args.experts else ""
    output = args.output or RESULTS / f"step_time{mode}.json"
    settings = {
        key: getattr(args, key)
        for key in ("threads", "tokens", "seq_length", "layers", "vocab", "bf16", "device", "rounds")
    }
    write_results(__file__, settings | {"figures": figures}, "megatron-core", "transformers", output=output)
    headline(**keys)


if __name__ == "__main__":
    main()
