"""See what the experts of a trained adapter do: pictures and one HTML page that can be sent to others.

    python tools/inspect_adapter.py runs/mine
    python tools/inspect_adapter.py runs/mine --hf-model models/my-llama --data data/math.jsonl data/code.json

The adapter is the `save` directory of a run, one `iter_*` directory in it, or a PEFT adapter, of any method. The page
has how alike the experts are, how many directions they use, how much each adds to each layer, and the size beside the
other methods. With --hf-model and --data also which task takes which experts, and samples coloured by expert.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.progress import track
from transformers.utils import logging

from malora_dist.errors import ConfigError, exit_on_user_error
from malora_dist.files import path_argument
from malora_dist.inspection.report import Request, inspect_adapter, write_report
from malora_dist.inspection.routing import Samples


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=path_argument, metavar="RUN_OR_ADAPTER", help="run, iter_* or PEFT directory")
    parser.add_argument(
        "--out", type=path_argument, metavar="DIR", help="directory to write (default: ADAPTER-inspection beside it)"
    )
    parser.add_argument(
        "--hf-model", type=path_argument, metavar="DIR", help="the adapter's base, a Hugging Face model"
    )
    parser.add_argument(
        "--data", type=path_argument, nargs="+", default=[], metavar="FILE", help="samples, a file a task"
    )
    parser.add_argument(
        "--samples", type=_positive, default=64, metavar="N", help="of each file, evenly spread (default: %(default)s)"
    )
    parser.add_argument(
        "--seq-length",
        type=_positive,
        default=512,
        metavar="N",
        help="cut longer samples (default: %(default)s tokens)",
    )
    parser.add_argument(
        "--show", type=_positive, default=2, metavar="N", help="samples of each file to colour (default: %(default)s)"
    )
    parser.add_argument(
        "--layer", type=int, metavar="L", help="colour by this layer (default: the one that tells most)"
    )
    parser.add_argument("--projection", metavar="NAME", help="and this projection, such as q_proj")
    parser.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="samples per forward pass")
    parser.add_argument("--json", type=path_argument, metavar="OUT", help="also write the numbers as JSON")
    return parser


@exit_on_user_error
def main() -> None:
    """Inspect, and say where the page is."""
    args = build_parser().parse_args()
    logging.disable_progress_bar()  # of loading weights
    if args.json is not None and not args.json.absolute().parent.is_dir():
        raise ConfigError("--json", str(args.json), "lies in no existing directory", "create it first")
    console = Console(stderr=True)

    def tracked(items: Sequence[Any], doing: str) -> Iterable[Any]:
        return track(items, doing, console=console, transient=True, disable=not console.is_terminal)

    samples = Samples(args.samples, args.seq_length, args.show, args.batch_size)
    request = Request(args.adapter, args.out, args.hf_model, args.data, samples, args.layer, args.projection)
    inspection = inspect_adapter(request, tracked)
    page = write_report(request, inspection, tracked)
    if args.json is not None:
        args.json.write_text(json.dumps(inspection.numbers, indent=1) + "\n", encoding="utf-8")
    print(f"written: {page}")


if __name__ == "__main__":
    main()
