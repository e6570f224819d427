"""Count what each method trains on a model, and choose ranks that make methods equally large. No weights are read.

    python tools/budget.py --shape llama2-7b
    python tools/budget.py --hf-model LLAMA --config FILE...
    python tools/budget.py --hf-model LLAMA --match method=molora lora_rank=8
    python tools/budget.py --shape llama2-7b --rank-rule 8

The first has a row for every method, the second for every config file. With --match every method gets the largest
lora_rank with which it trains no more than the method asked for: the start of a fair comparison. --rank-rule gives the
sizes of MALoRA that the paper's rule has for MoLoRA of that rank.

key=value pairs are config keys (docs/config.md) and count for every row. The table is in millions of parameters: "of
base" compares with the base's, "of all" with those of base and adapter together, as PEFT and the paper do.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from malora_dist.config_file import load_config
from malora_dist.errors import ConfigError, exit_on_user_error
from malora_dist.families.base import DecoderConfig, family_of, projection_widths
from malora_dist.families.shapes import SHAPES, base_parameters, released_config
from malora_dist.files import path_argument
from malora_dist.methods.base import METHODS
from malora_dist.methods.budget import rank_rule
from malora_dist.methods.comparison import Base, Candidate, others_as_large_as

SHARES = (0.25, 0.5, 0.75, 1.0)


def every_method(base: Base, overrides: Sequence[str]) -> tuple[list[Candidate], list[str]]:
    """(all methods with these settings, why some are left out)."""
    Candidate("config", load_config(None, overrides), base).check()
    candidates, left_out = [], []
    for method in METHODS:
        candidate = Candidate(method, load_config(None, [*overrides, f"method={method}"]), base)
        try:
            candidate.check()
            candidates.append(candidate)
        except ConfigError as error:
            left_out.append(f"{method} is left out: {error}")
    return candidates, left_out


def by_rank_rule(rank: int, base: Base, file: str | None, overrides: Sequence[str]) -> list[Candidate]:
    """MoLoRA of a rank, and MALoRA of about its size."""
    molora = load_config(file, [*overrides, "method=molora", f"lora_rank={rank}"])
    candidates = [Candidate("molora", molora, base)]
    for share in SHARES:
        shared_dim, lora_rank = rank_rule(rank, molora.num_lora_experts, share)
        widths = [f"lora_rank={lora_rank}", f"shared_dim={shared_dim}"]
        malora = load_config(file, [*overrides, "method=malora", *widths])
        candidates.append(Candidate(f"malora, lambda {share}", malora, base))
    return candidates


def choose(args: argparse.Namespace, base: Base) -> tuple[list[Candidate], list[str]]:
    """(the rows that the command line asks for, why methods are left out)."""
    files = [word for word in args.config if "=" not in word]  # key=value pairs may follow them
    overrides = [*(word for word in args.config if "=" in word), *args.overrides]
    file = files[0] if files else None
    if args.solve is not None and not args.match:
        raise ConfigError("--solve", args.solve, "belongs to --match", "add --match")
    if len(files) > 1 and (args.match or args.rank_rule is not None):
        raise ConfigError("--config", files, "must be one file with --match or --rank-rule", "name one")
    if args.match:
        config = load_config(file, overrides)
        reference = Candidate(config.method, config, base)
        reference.check()
        others, left_out = others_as_large_as(reference, args.solve or "lora_rank")
        return [reference, *others], left_out
    if args.rank_rule is None and not files:
        return every_method(base, overrides)
    if args.rank_rule is not None:
        candidates = by_rank_rule(args.rank_rule, base, file, overrides)
    else:
        candidates = [Candidate(Path(file).stem, load_config(file, overrides), base) for file in files]
    for candidate in candidates:
        candidate.check()
    return candidates, []


def table_of(candidates: Sequence[Candidate], title: str) -> Table:
    """One row each, in millions of parameters."""
    rows = [candidate.figures for candidate in candidates]
    kinds = list(dict.fromkeys(kind for candidate in candidates for kind in candidate.spec.declared.parameters))
    table = Table(title=title, box=SIMPLE_HEAD)
    table.add_column("adapter", no_wrap=True)
    for heading in ("r", "d", "s", *kinds, "trained", "of base", "of all"):
        table.add_column(heading, justify="right")
    for row in rows:
        counts = {kind: f"{count / 1e6:.4g}" for kind, count in row["trained"].items()}
        cells = counts | dict.fromkeys(row["frozen"], "frozen")
        table.add_row(
            row["name"],
            str(row["lora_rank"]),
            str(row["shared_dim"] or ""),
            f"{row['scaling']:.3g}",
            *(cells.get(kind, "") for kind in kinds),
            f"{row['total'] / 1e6:.4g}",
            f"{row['of_base']:.2%}",
            f"{row['of_all']:.2%}",
        )
    return table


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--hf-model", type=path_argument, metavar="DIR", help="a Hugging Face model, or its config.json")
    model.add_argument("--shape", default="llama2-7b", help=f"instead: {' or '.join(SHAPES)} (default: %(default)s)")
    parser.add_argument("--config", nargs="+", default=[], metavar="FILE", help="config files, one row each")
    parser.add_argument("--match", action="store_true", help="all methods as large as the one of the config")
    parser.add_argument(
        "--solve", choices=("lora_rank", "shared_dim"), help="with --match: what is chosen (default: lora_rank)"
    )
    parser.add_argument("--rank-rule", type=int, metavar="R", help="MALoRA for MoLoRA of rank R")
    parser.add_argument("--json", type=path_argument, metavar="OUT", help="also write the numbers as JSON")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config keys")
    return parser


def _read_model(args: argparse.Namespace) -> tuple[str, DecoderConfig]:
    if args.hf_model is None:
        return args.shape, released_config(args.shape)
    directory = args.hf_model.parent if args.hf_model.name == "config.json" else args.hf_model
    return str(args.hf_model), family_of(directory).hf


@exit_on_user_error
def main() -> None:
    """Print the table."""
    args = build_parser().parse_args()
    if args.json is not None and not args.json.absolute().parent.is_dir():
        raise ConfigError("--json", str(args.json), "lies in no existing directory", "create it first")
    name, hf = _read_model(args)
    base = Base(projection_widths(hf), hf.num_hidden_layers, base_parameters(hf))
    candidates, left_out = choose(args, base)

    console = Console()
    wide = console if console.is_terminal else Console(width=140)
    wide.print(table_of(candidates, f"{name}, {base.parameters / 1e6:,.4g} M parameters"))
    for line in left_out:
        wide.print(line, soft_wrap=True)
    if args.json is not None:
        report = {"model": name, "base_parameters": base.parameters, "rows": [c.figures for c in candidates]}
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
