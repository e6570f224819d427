"""A model of step time and memory per GPU on 8 to 4096 GPUs: LoRA, MoLoRA and MALoRA on Llama-3 8B and 70B.

    python tools/benchmarks/scaling.py --png tools/benchmarks/results/scaling.png

Every figure is modelled. The formulas are in scaling_model.py, on the shapes of scaling_parts.py and the rates of
scaling_cluster.py; each rate is an option (`--network 25e9`), and the first table says where its value comes from.

    molora x-wide      MoLoRA as usual: x goes to the experts by all_to_all, tokens sorted by expert
    molora gather      MoLoRA with `dispatch: gather_experts`
    malora EP=1        every rank has all experts
    malora all_to_all, malora gather, malora auto    MALoRA with this `dispatch`
    float32 router     auto, were x copied to float32 for the router: what splitting the router saves

Ranks and projections are those of the paper (settings.py). Each method runs in its own fastest layout that fits into
memory, TP x PP x EP (R: with recompute), with `--ep` expert-parallel ranks or more, or as many as plain LoRA has
data-parallel ranks; experts are computed in the cheaper form. Weak scaling is `--tokens-per-gpu` a step, strong scaling
`--global-tokens` a step. Results: tools/benchmarks/results/scaling.json. The figure needs matplotlib. Takes ten
seconds or so on one core.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from common import RESULTS, headline, print_table, write_results
from scaling_cluster import Cluster
from scaling_measured import Measured, measured_parts, measured_rates
from scaling_model import Bytes, Times
from scaling_parts import Contender, Model, dispatch_of
from scaling_search import Job, Run, best, crossovers, sent_bytes
from settings import SETTINGS

from malora_dist.methods.spec import AdapterSpec

MODELS = (
    Model("8B", hidden=4096, ffn=14336, layers=32, heads=32, kv_heads=8),
    Model("70B", hidden=8192, ffn=28672, layers=80, heads=64, kv_heads=8),
)
POWERS = tuple(2**i for i in range(3, 13))

#: {GPUs or experts: {method: its run}}
Runs = dict[int, dict[str, Run | None]]


def spec(method: str, num_experts: int) -> AdapterSpec:
    """Of the paper's setting, with so many experts."""
    return SETTINGS["paper"].spec(method, num_lora_experts=num_experts)


def contenders(num_experts: int) -> list[Contender]:
    """What is compared; the first is what the others are held against."""
    lora, molora, malora = (spec(method, num_experts) for method in ("lora", "molora", "malora"))
    return [
        Contender("lora", lora, "local"),
        Contender("molora x-wide", molora, "all_to_all", token_dispatch=True),
        Contender("molora gather", molora, "gather_experts"),
        Contender("malora EP=1", malora, "local"),
        Contender("malora all_to_all", malora, "all_to_all"),
        Contender("malora gather", malora, "gather_experts"),
        Contender("malora auto", malora, "auto"),
        Contender("float32 router", malora, "auto", float32_router=True),
    ]


def compare(
    cluster: Cluster, model: Model, job: Job, num_experts: int, gpus: int, tokens: int
) -> dict[str, Run | None]:
    """{contender: its best run}; with fewer expert-parallel ranks where plain LoRA has no more data-parallel ones."""
    lora, *others = contenders(num_experts)
    reference = best(cluster, model, lora, job, gpus, tokens)
    if reference is None:
        return {contender.name: None for contender in contenders(num_experts)}
    limited = replace(job, ep=min(job.ep, reference.layout.dp))
    return {lora.name: reference} | {c.name: best(cluster, model, c, limited, gpus, tokens) for c in others}


def ratio(runs: Mapping[str, Run | None], name: str, reference: str = "lora") -> float | None:
    """Step time of one method over another's; None if either does not fit."""
    own, other = runs[name], runs[reference]
    return own.times.total / other.times.total if own and other else None


def cell(value: float | None, form: str = ".2f") -> str:
    return "no fit" if value is None else format(value, form)


def print_runs(title: str, first: str, model: Model, by: Runs) -> None:
    """One row per number of GPUs or experts: LoRA's seconds, the others over LoRA, and where `auto` runs."""
    print(f"\n{title}. LoRA in seconds, the others as a ratio to it (modelled)")
    names = list(next(iter(by.values())))
    rows = []
    for key, runs in by.items():
        lora, auto = runs["lora"], runs["malora auto"]
        row = [str(key), cell(lora.times.total if lora else None, ".3f")]
        row += [cell(ratio(runs, name)) for name in names[1:]] + [lora.where if lora else "-"]
        row += [auto.where, gathering(model, auto), f"{auto.memory.total / 1e9:.0f}"] if auto else ["-"] * 3
        rows.append(row)
    print_table([first, *names, "lora on", "auto on", "auto gathers", "auto GB"], rows)


def gathering(model: Model, run: Run) -> str:
    """How many of a layer's adapted linears gather their experts."""
    linears = model.adapted(run.contender.spec)
    gathered = sum(dispatch_of(run.contender, linear, run.layout) == "gather_experts" for linear in linears)
    return f"{gathered} of {len(linears)}" if run.layout.ep > 1 else "local"


def print_parts(title: str, runs: Mapping[str, Run | None]) -> None:
    """What a step consists of, in milliseconds, and the memory of the fullest GPU, in GB."""
    fitting = {name: run for name, run in runs.items() if run is not None}
    times = {f.name: [f"{getattr(run.times, f.name) * 1e3:.0f}" for run in fitting.values()] for f in fields(Times)}
    sizes = {f.name: [f"{getattr(run.memory, f.name) / 1e9:.1f}" for run in fitting.values()] for f in fields(Bytes)}
    for what, parts in (("milliseconds of a step", times), ("GB of the fullest GPU", sizes)):
        print(f"\n{title}: {what} (modelled)")
        columns = [list(fitting), [run.where for run in fitting.values()], *parts.values()]
        print_table(["method", "TPxPPxEP", *parts], list(zip(*columns, strict=True)))


def print_findings(model: Model, by: Runs) -> None:
    """Which dispatch wins at which number of experts, what `auto` loses, and what the router costs."""
    ways = ("malora gather", "malora all_to_all")
    seconds = {n: {name: run.times.total for name, run in runs.items() if run is not None} for n, runs in by.items()}
    seconds = {n: of for n, of in seconds.items() if {"lora", "malora auto", "float32 router"} <= of.keys()}
    fastest = {n: min((way for way in ways if way in of), key=lambda way: of[way]) for n, of in seconds.items()}
    for way in ways:
        where = ", ".join(str(n) for n, name in fastest.items() if name == way) or "none"
        print(f"- {way.split()[1]} is the faster dispatch of MALoRA at N {where}")
    for n, of in seconds.items():
        if (loss := of["malora auto"] / of[fastest[n]] - 1) > 0.02:
            print(f"- auto takes {loss:.0%} longer than that at N {n}")
    for n in {min(seconds), max(seconds)} if seconds else ():
        more = seconds[n]["float32 router"] / seconds[n]["malora auto"]
        print(f"- at N {n} a router in float32 would make a step {more:.2f} times as long")


def print_sensitivity(cluster: Cluster, model: Model, job: Job, experts: int, gpus: int, tokens: int) -> None:
    """The headline ratios with each rate halved and doubled, shares and efficiencies at most 1."""
    print(f"\nLlama-3 {model.name} on {gpus} GPUs, N {experts}: how much each rate matters (modelled)")
    rows = []
    for field in fields(cluster):
        if isinstance(field.default, int):
            continue
        value = getattr(cluster, field.name)
        row = [field.name]
        for other in (value / 2, min(2 * value, 1.0) if value <= 1 else 2 * value):
            runs = compare(replace(cluster, **{field.name: other}), model, job, experts, gpus, tokens)
            row += [f"{other:g}", cell(ratio(runs, "malora auto")), cell(ratio(runs, "molora x-wide", "malora auto"))]
        rows.append(row)
    print_table(["rate", *(("at", "malora/lora", "molora/malora") * 2)], rows)


def print_traffic(num_experts: int, ep: int, tokens: int) -> None:
    """Bytes by dispatch: why gathering wins at few experts."""
    print(f"\nMB a rank sends in a step for dispatch, N {num_experts}, EP {ep}, {tokens} tokens of its own (modelled)")
    rows = []
    for contender in contenders(num_experts):
        if contender.dispatch in ("all_to_all", "gather_experts"):
            sent = [sent_bytes(model, contender.spec, contender.dispatch, ep, tokens) for model in MODELS]
            rows.append([contender.name, *(f"{nbytes / 1e6:,.0f}" for nbytes in sent)])
    print_table(["method", *(model.name for model in MODELS)], rows)


def print_crossovers(cluster: Cluster, model: Model, job: Job, per_step: int) -> dict[str, dict[str, int | None]]:
    """Where all_to_all begins to win; returns {"EP and tokens": crossovers}."""
    print(f"\nLlama-3 {model.name}: experts from which all_to_all beats gather_experts, TP and PP 1 (modelled)")

    def malora(experts: int, dispatch: str) -> Contender:
        return Contender(dispatch, spec("malora", experts), dispatch)

    rows, found = [], {}
    for ep in sorted({2, 4, 8, 16, 64, job.ep} - {1}):
        for tokens in sorted({job.micro_tokens, per_step, 4 * per_step}):
            at = crossovers(cluster, model, malora, job, ep, tokens)
            rows.append([ep, tokens, *("none" if n is None else str(n) for n in at.values())])
            found[f"ep{ep} tokens{tokens}"] = at
    print_table(["EP", "tokens of a rank", "in bytes", "in time", "auto: first linear", "auto: all linears"], rows)
    return found


def draw(file: Path, strong: Runs, experts: Runs, titles: Sequence[str]) -> None:
    """Left: step time over GPUs. Right: its ratio to LoRA's over experts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    styles = {"lora": "k-", "molora x-wide": "C3s-", "malora all_to_all": "C1o-", "malora gather": "C2^-"}
    styles |= {"malora auto": "C0x--", "float32 router": "C4:"}
    for name, style in styles.items():
        label = f"malora auto, {name}" if name == "float32 router" else name
        seconds = [(gpus, run.times.total) for gpus, runs in strong.items() if (run := runs[name]) is not None]
        ratios = [(n, value) for n, runs in experts.items() if (value := ratio(runs, name)) is not None]
        for axis, points in ((left, seconds), (right, ratios)):
            axis.plot([x for x, _ in points], [y for _, y in points], style, label=label, markersize=4, linewidth=1.2)
    for axis, title in zip((left, right), titles, strict=True):
        axis.set(title=title, xscale="log", yscale="log")
        axis.set_xticks(POWERS, [str(power) for power in POWERS])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    left.set(xlabel="GPUs", ylabel="seconds per step")
    right.set(xlabel="experts", ylabel="step time / LoRA's")
    right.set_yticks((1, 1.5, 2, 3, 5, 10, 20), ["1", "1.5", "2", "3", "5", "10", "20"])
    left.legend(fontsize=8)
    figure.suptitle("Llama-3 8B: modelled, not measured", fontsize=10)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=90)


def as_json(by: Runs) -> dict[str, Any]:
    """Seconds, gigabytes and layout of every run."""
    return {
        str(key): {
            name: run and [run.where, round(run.times.total, 4), round(run.memory.total / 1e9, 1)]
            for name, run in runs.items()
        }
        for key, runs in by.items()
    }


def parse() -> argparse.Namespace:
    """The command line; rates of the cluster that are not given are None."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--micro-batch-size", type=int, default=1, help="sequences")
    parser.add_argument("--tokens-per-gpu", type=int, default=8192, help="of a step, weak scaling")
    parser.add_argument("--global-tokens", type=int, default=2**22, help="of a step, strong scaling")
    parser.add_argument("--experts", type=int, default=8, help="in the tables over GPUs")
    parser.add_argument("--gpus", type=int, default=512, help="in the tables over experts")
    parser.add_argument("--ep", type=int, default=8, help="least expert-parallel ranks")
    parser.add_argument("--distributed-optimizer", action="store_true", help="shard Adam's state over DP")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the other benchmarks' results")
    parser.add_argument("--png", type=Path, help="draw a figure, with matplotlib")
    parser.add_argument("--output", type=Path, help="another JSON file to write")
    rates = parser.add_argument_group("the cluster, per GPU and direction")
    for field in fields(Cluster):
        text = f"{field.metadata['help']} (default: {field.default:g}, {field.metadata['source']})"
        rates.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), help=text)
    args = parser.parse_args()
    for name in ("seq_length", "micro_batch_size", "tokens_per_gpu", "global_tokens", "experts", "gpus", "ep"):
        value = getattr(args, name)
        if value < 1 or value & (value - 1):
            parser.error(f"--{name.replace('_', '-')} {value} must be a power of two: layouts are counted in them")
    if args.png is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("--png needs the package matplotlib: pip install matplotlib")
    return args


def assumed_cluster(args: argparse.Namespace) -> Cluster:
    """The cluster of the command line, then of what was measured, then of the defaults; its table printed."""
    given = {field.name: value for field in fields(Cluster) if (value := getattr(args, field.name)) is not None}
    measured = measured_rates(args.results, replace(Cluster(), **given))
    cluster = replace(Cluster(), **(measured | given))
    rows = []
    for field in fields(cluster):
        source = "step_time.json, cuda" if field.name in measured else field.metadata["source"]
        name = f"--{field.name.replace('_', '-')}: {field.metadata['help']}"
        value = f"{getattr(cluster, field.name):g}"
        rows.append([name, value, "command line" if field.name in given else source])
    print_table(["the cluster", "value", "source"], rows)
    return cluster


def print_measured(parts: Sequence[Measured]) -> None:
    """What other benchmarks found of the parts that the model is made of."""
    rows = [[part.part, f"{part.value:.2f}", f"{part.modelled:g}", part.source] for part in parts]
    print(f"\nOf its parts, other benchmarks have measured {'these' if rows else 'none yet'}")
    print_table(["part", "measured", "in the model", "from"], rows)


def model_runs(cluster: Cluster, model: Model, job: Job, args: argparse.Namespace) -> dict[str, Runs]:
    """Weak and strong scaling over GPUs, and the step over the number of experts."""

    def of(experts: int, gpus: int, tokens: int) -> dict[str, Run | None]:
        return compare(cluster, model, job, experts, gpus, tokens)

    return {
        "weak": {gpus: of(args.experts, gpus, args.tokens_per_gpu * gpus) for gpus in POWERS},
        "strong": {gpus: of(args.experts, gpus, args.global_tokens) for gpus in POWERS},
        "experts": {experts: of(experts, args.gpus, args.tokens_per_gpu * args.gpus) for experts in POWERS},
    }


def main() -> None:
    """Model, print, write down and draw."""
    args = parse()
    cluster = assumed_cluster(args)
    parts = measured_parts(args.results, cluster)
    print_measured(parts)
    job = Job(args.seq_length, args.micro_batch_size, args.ep, args.distributed_optimizer)
    per_gpu = f"{args.tokens_per_gpu} tokens per GPU and step"
    keys: dict[str, float | str] = {}
    results: dict[str, Any] = {"modelled": True, "cluster": asdict(cluster), "job": asdict(job)}
    results["measured"] = [part._asdict() for part in parts]
    runs = {model.name: model_runs(cluster, model, job, args) for model in MODELS}
    for model in MODELS:
        of = runs[model.name]
        print_runs(f"Llama-3 {model.name}, weak scaling, {per_gpu}, N {args.experts}", "GPUs", model, of["weak"])
        fixed = f"{args.global_tokens} tokens per step, N {args.experts}"
        print_runs(f"Llama-3 {model.name}, strong scaling, {fixed}", "GPUs", model, of["strong"])
        print_runs(f"Llama-3 {model.name} on {args.gpus} GPUs, {per_gpu}", "N", model, of["experts"])
        at = of["experts"][args.experts]
        print_findings(model, of["experts"])
        print_parts(f"Llama-3 {model.name} on {args.gpus} GPUs, {per_gpu}, N {args.experts}", at)
        found = print_crossovers(cluster, model, job, args.tokens_per_gpu)
        results[model.name] = {name: as_json(by) for name, by in of.items()} | {"crossovers": found}
        where = f"{model.name},{args.gpus}gpus"
        keys[f"malora/lora@{where}"] = ratio(at, "malora auto") or "none"
        keys[f"molora/malora@{where}"] = ratio(at, "molora x-wide", "malora auto") or "none"
        keys[f"crossover_N@{model.name},ep{args.ep}"] = str(found[f"ep{args.ep} tokens{args.tokens_per_gpu}"]["time"])
    print_traffic(args.experts, args.ep, args.tokens_per_gpu)
    print_sensitivity(cluster, MODELS[0], job, args.experts, args.gpus, args.tokens_per_gpu * args.gpus)
    write_results(__file__, results, output=args.output)
    if args.png is not None:
        titles = (f"{args.global_tokens} tokens per step, {args.experts} experts", f"{args.gpus} GPUs, {per_gpu}")
        draw(args.png, runs["8B"]["strong"], runs["8B"]["experts"], titles)
    headline(**keys)


if __name__ == "__main__":
    main()
