"""Step time of every method on the same Llama, as ratios to LoRA's and MALoRA's beside their floors in operations.

    python tools/benchmarks/step_time.py
    python tools/benchmarks/step_time.py --setting rank8
    python tools/benchmarks/step_time.py --device cuda --bf16 --shape llama3-8b --layers 2 --tokens 8192
    python tools/benchmarks/step_time.py --experts 8,512 --shape llama3-8b --vocab 1024 --tokens 8192 --compute grouped
    python tools/benchmarks/step_time.py --forms
    python tools/benchmarks/step_time.py --setting rank8 --against OTHER_CHECKOUT --against-keys lora_rank=8

A step is Trainer.train_step: forward, backward, gradient clipping and the optimizer, of a random Llama with Llama 2's
proportions or a released model's layers. The trainers of all methods are in memory at once and take turns; ratios are
formed round by round. ``--setting`` is one of settings.py: the ranks of the paper's table 10, or small ones.

    usual_dora      as PEFT computes it: W0 + s B A in every forward (usual_dora.py)
    dora            norms once a step, without that product
    usual_molora    the usual token dispatch, in FastMoE's order of operations (usual_dispatch.py)
    molora          in the form that ``expert_compute: auto`` takes; molora_grouped: sorted by expert
    malora          likewise

Two floors stand beside a ratio: that of the whole step, from malora_dist/planning/flops.py (frozen linears, attention,
output layer and adapters, forward and backward), and that of one square linear of the hidden size, which for MALoRA's
gated block is [2 + 3 (d + N + N r)/h + 3 N r d/h^2] / [2 + 6 r/h], the r below LoRA's own. Normalisation, activations
and the optimizer are in no floor. Peak memory is what two steps need above the built model, each method in its own
process.

--experts: MALoRA's step time over N at fixed k, relative to the first N, with a router per projection and with
fuse_projections. In every form the routers grow with N (in the floor), and so does what is done once a step to every
parameter: zeroing, adding and clipping gradients, and the optimizer (not in the floor).
--forms: where the gated block and the grouped form of one adapter cost the same, beside the rule of
``expert_compute: auto``.
--against: the same steps with the package of another checkout of this project, in turns (against.py). Keys that mean
something else over there are given with --against-keys. Once malora's experts had the rank rank_expansion * lora_rank:
there `--setting rank8` is `--against-keys lora_rank=8 lora_alpha=16 rank_expansion=1.25`.

Results: tools/benchmarks/results/step_time.json, or step_time_SETTING.json, step_time_experts.json,
step_time_forms.json, step_time_against.json.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from against import compare_checkouts, print_checkouts
from common import RESULTS, headline, print_table, ratios, spread, summary, write_results
from forms import measure_forms
from models import llama_config, llama_like
from settings import SETTINGS, Setting
from step_experts import FORMS, compare_experts, print_experts
from steps import Bench, Run
from transformers import LlamaConfig
from usual_dispatch import dispatch_as_usual
from usual_dora import dora_as_usual

from malora_dist.families.shapes import SHAPES
from malora_dist.parallel.device import choose_device
from malora_dist.planning.flops import square_macs


class Contender(NamedTuple):
    """A method, what is set besides its setting's keys, and what computes it in another way."""

    method: str
    keys: tuple[str, ...] = ()
    patch: Callable[[Any], None] | None = None


CONTENDERS = {
    "lora": Contender("lora"),
    "asymmetric_lora": Contender("asymmetric_lora"),
    "usual_dora": Contender("dora", patch=dora_as_usual),
    "dora": Contender("dora"),
    "usual_molora": Contender("molora", ("expert_compute=grouped",), dispatch_as_usual),
    "molora_grouped": Contender("molora", ("expert_compute=grouped",)),
    "molora": Contender("molora"),
    "malora": Contender("malora"),
}
METHODS = ("lora", "usual_dora", "dora", "usual_molora", "molora", "malora")
METHODS_AGAINST = ("lora", "molora", "malora")


class Bar(NamedTuple):
    """What the median of a ratio is held against."""

    limit: float
    is_upper: bool

    def describe(self, ratio: float) -> str:
        """Whether it is met."""
        is_met = ratio <= self.limit if self.is_upper else ratio >= self.limit
        return f"bar {'<=' if self.is_upper else '>='} {self.limit}: {'met' if is_met else 'missed'}"


#: In the setting of the paper.
BARS = {
    "malora_over_lora": Bar(1.05, is_upper=True),
    "usual_molora_over_malora": Bar(1.2, is_upper=False),
    "usual_dora_over_malora": Bar(1.1, is_upper=False),
    "dora_over_malora": Bar(1.1, is_upper=False),
}


def run_of(name: str, setting: Setting, args: argparse.Namespace) -> Run:
    """A contender in a setting."""
    contender = CONTENDERS[name]
    return Run([*setting.overrides(contender.method), *contender.keys, *args.keys], contender.patch)


def compare_methods(bench: Bench, setting: Setting, args: argparse.Namespace) -> dict[str, Any]:
    """{method: figures}; "lora" and "malora" among the methods are what the others are divided by."""
    runs = {name: run_of(name, setting, args) for name in args.methods}
    seconds = bench.step_seconds(runs, args.rounds)
    operations = {name: bench.operations(run) for name, run in runs.items()}
    square = {
        name: square_macs(run.config.declared, bench.hf.hidden_size, bench.form(run)) for name, run in runs.items()
    }
    figures: dict[str, Any] = {}
    for name, run in runs.items():
        parts = seconds[name]
        figures[name] = {
            "form": bench.form(run) if run.config.is_mixture else None,
            "trainable_parameters": bench.trained_numbers(run),
            "seconds": summary(parts.step),
            "forward_seconds": summary(parts.forward),
            "backward_seconds": summary(parts.backward),
            "optimizer_seconds": summary(parts.optimizer),
            "flop_per_second": operations[name] / summary(parts.step)["median"],
        }
        for other in {"lora", "malora"} & runs.keys():
            figures[name][f"to_{other}"] = ratios(parts.step, seconds[other].step)
        if "lora" in runs:
            figures[name] |= {
                "floor": operations[name] / operations["lora"],
                "square_floor": square[name] / square["lora"],
            }
        if args.memory:
            figures[name]["peak_bytes"] = bench.peak_bytes(run)
    return figures


def print_methods(figures: Mapping[str, Any]) -> dict[str, float]:
    """The table of one model, and its headline ratios."""
    times = ("seconds", "forward_seconds", "backward_seconds", "optimizer_seconds")
    rows = [
        (
            name,
            f"{f['trainable_parameters'] / 1e6:.2f}",
            *(f"{f[part]['median'] * 1e3:.0f}" for part in times),
            *(spread(f[ratio]) if ratio in f else "-" for ratio in ("to_lora", "to_malora")),
            *(f"{f[floor]:.3f}" if floor in f else "-" for floor in ("floor", "square_floor")),
            f"{f['peak_bytes'] / 1e6:.0f}" if "peak_bytes" in f else "-",
        )
        for name, f in figures.items()
    ]
    header = (
        "method", "M params", "step ms", "forward", "backward", "optimizer", "/ lora [quartiles]",
        "/ malora [quartiles]", "floor", "of a square linear", "MB",
    )  # fmt: skip
    print_table(header, rows)
    keys = {f"{name}_over_malora": f["to_malora"]["median"] for name, f in figures.items() if "to_malora" in f}
    keys = {key: value for key, value in keys.items() if key not in ("lora_over_malora", "malora_over_malora")}
    if {"lora", "malora"} <= figures.keys():
        keys = {"malora_over_lora": figures["malora"]["to_lora"]["median"]} | keys
        keys["malora_floor"] = figures["malora"]["floor"]
    return keys


def print_bars(keys: Mapping[str, float]) -> None:
    """Whether each ratio that has a bar meets it."""
    for key, bar in BARS.items():
        if key in keys:
            print(f"{key} {keys[key]:.3f}, {bar.describe(keys[key])}")


def numbers(text: str) -> list[int]:
    """Of a comma-separated list."""
    return [int(part) for part in text.split(",")]


def forms(text: str) -> list[str]:
    """Of a comma-separated list.

    Raises:
        ValueError: no such form.
    """
    return [FORMS[FORMS.index(part)] for part in text.split(",")]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=SETTINGS, default="paper", help="ranks and projections (default: paper)")
    parser.add_argument("--methods", nargs="+", choices=CONTENDERS, help=f"default: {' '.join(METHODS)}")
    parser.add_argument("--keys", nargs="+", default=[], help="more config keys of every method, key=value")
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
    parser.add_argument("--experts", type=numbers, help="MALoRA's step time over these N instead")
    parser.add_argument("--compute", type=forms, default=FORMS, help="with --experts: which forms (default: both)")
    parser.add_argument("--forms", action="store_true", help="crossover of the two forms of one adapter instead")
    parser.add_argument("--against", type=Path, help="root of another checkout of this project, to compare with it")
    parser.add_argument("--against-keys", nargs="+", default=[], help="config keys for that one only, key=value")
    parser.add_argument("--output", type=Path, help="another JSON file to write")
    args = parser.parse_args()
    args.seq_length = min(args.seq_length, args.tokens)
    args.methods = args.methods or (METHODS_AGAINST if args.against else METHODS)
    if args.tokens % args.seq_length:
        parser.error(f"--tokens {args.tokens} must be a multiple of --seq-length {args.seq_length}")
    if args.experts and len(args.experts) < 2:
        parser.error("--experts needs at least two numbers")
    if args.against and not (args.against / "malora_dist" / "__init__.py").is_file():
        parser.error(f"--against {args.against} has no malora_dist: name the root of a checkout")
    if args.against and any(CONTENDERS[name].patch for name in args.methods):
        parser.error("--against compares methods of the package; usual_dora and usual_molora belong to the benchmarks")
    return args


def models_of(args: argparse.Namespace) -> dict[str, LlamaConfig]:
    """{label: the Llama} to measure."""
    if args.shape:
        shape = SHAPES[args.shape] | {"layers": args.layers} | ({"vocab": args.vocab} if args.vocab else {})
        return {args.shape: llama_config(**shape)}
    return {str(hidden): llama_like(hidden, args.layers, args.vocab or 1024) for hidden in args.hidden}


def measure_model(hf: LlamaConfig, args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, float]]:
    """(figures, headline ratios) of one Llama, its table printed."""
    setting = SETTINGS[args.setting]
    device = choose_device(args.device)
    print(
        f"\nsetting {args.setting}, hidden {hf.hidden_size}, ffn {hf.intermediate_size}, "
        f"layers {hf.num_hidden_layers}, vocabulary {hf.vocab_size}, {args.tokens} tokens in sequences of "
        f"{args.seq_length}, {'bfloat16' if args.bf16 else 'float32'} on {device.type}, {args.threads} threads",
        flush=True,
    )
    with tempfile.TemporaryDirectory(prefix="malora-step-time-") as scratch:
        if args.against:
            runs = {name: [f"device={device.type}", *run_of(name, setting, args).keys] for name in args.methods}
            figures = compare_checkouts(runs, Path(scratch), hf, args)
            return figures, print_checkouts(figures)
        bench = Bench(Path(scratch), hf, args)
        if args.experts:
            figures = compare_experts(bench, setting, args)
            return figures, print_experts(figures)
        figures = compare_methods(bench, setting, args)
        keys = print_methods(figures)
        if args.setting == "paper":
            print_bars(keys)
        return figures, keys


def measure_all_forms(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, float | str]]:
    """(figures, headline pairs) of --forms."""
    figures: dict[str, Any] = {}
    keys: dict[str, float | str] = {}
    device, dtype = choose_device(args.device), torch.bfloat16 if args.bf16 else torch.float32
    for hidden in args.hidden:
        figures[str(hidden)], crossovers = measure_forms(hidden, args.tokens, args.rounds, device, dtype)
        keys |= {f"{key}@{hidden}": value for key, value in crossovers.items()}
    return figures, keys


def measure_models(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, float | str]]:
    """(figures, headline pairs) of every other mode."""
    models = models_of(args)
    figures: dict[str, Any] = {}
    keys: dict[str, float] = {}
    for label, hf in models.items():
        figures[label], found = measure_model(hf, args)
        keys |= {f"{key}@{label}" if len(models) > 1 else key: value for key, value in found.items()}
    return figures, dict(keys)


def main() -> None:
    """Measure, print and write down."""
    args = parse()
    torch.set_num_threads(args.threads)
    figures, keys = measure_all_forms(args) if args.forms else measure_models(args)
    modes = {"forms": args.forms, "experts": args.experts, "against": args.against, args.setting: True}
    mode = next(mode for mode, is_chosen in modes.items() if is_chosen)
    output = args.output or RESULTS / ("step_time.json" if mode == "paper" else f"step_time_{mode}.json")
    settings = {
        key: getattr(args, key)
        for key in ("setting", "threads", "tokens", "seq_length", "layers", "vocab", "bf16", "device", "rounds")
    }
    write_results(__file__, settings | {"figures": figures}, "megatron-core", "transformers", output=output)
    headline(**keys)


if __name__ == "__main__":
    main()
