"""Convert a Llama between Hugging Face and megatron-core, and adapters between training and PEFT.

    python tools/convert_hf.py import         --hf-model LLAMA --megatron-path BASE
    python tools/convert_hf.py export         --megatron-path BASE --hf-path NEW_LLAMA
    python tools/convert_hf.py export-adapter --megatron-path SAVE --hf-path ADAPTER [--hf-model LLAMA]
    python tools/convert_hf.py import-adapter --adapter ADAPTER --megatron-path NEW_SAVE [--base BASE]
    python tools/convert_hf.py roundtrip      --hf-model LLAMA [--megatron-path BASE] [--hf-path NEW_LLAMA]
    python tools/convert_hf.py verify         BASE_OR_SAVE

One process, no GPU, and the memory of one tensor and one output file. `export` and `roundtrip` are exact to the bit.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

from malora_dist.checkpoint.convert import (
    DEFAULT_SHARD_BYTES,
    AdapterWeights,
    export_hf,
    fingerprint_hf,
    import_hf,
    read_adapter_weights,
    roundtrip,
)
from malora_dist.checkpoint.inspection import inspect
from malora_dist.errors import CheckpointError, exit_on_user_error
from malora_dist.files import path_argument


def run_import(args: argparse.Namespace) -> str:
    """Hugging Face -> megatron."""
    info = import_hf(args.hf_model, args.megatron_path)
    return (
        f"imported {info.num_parameters:,} parameters ({info.dtype}, {_gigabytes(args.megatron_path):.3g} GB, "
        f"fingerprint {info.fingerprint[:12]}) into {args.megatron_path}"
    )


def run_export(args: argparse.Namespace) -> str:
    """Megatron -> Hugging Face."""
    count = export_hf(args.megatron_path, args.hf_path, args.max_shard_bytes)
    return f"exported {count} tensors ({_gigabytes(args.hf_path):.3g} GB) into {args.hf_path}"


def run_export_adapter(args: argparse.Namespace) -> str:
    """Trained adapter -> PEFT."""
    from malora_dist.hf.export import write_peft_adapter  # loads PEFT, which the other commands do without

    adapter = read_adapter_weights(args.megatron_path)
    base = adapter.base_model_name_or_path
    if args.hf_model is not None:
        fingerprint = fingerprint_hf(args.hf_model)
        if fingerprint != adapter.base_fingerprint:
            raise CheckpointError(
                f"--hf-model {args.hf_model}: has fingerprint {fingerprint[:12]}, but the adapter was trained on "
                f"{base} with {adapter.base_fingerprint[:12]}; name that model"
            )
        base = str(args.hf_model.resolve())
    write_peft_adapter(args.hf_path, adapter.spec, adapter.tensors, base, adapter.base_fingerprint)
    count = f"{len(adapter.tensors)} tensors of iteration {adapter.iteration}"
    return f"exported {count} ({_gigabytes(args.hf_path):.3g} GB) into {args.hf_path}"


def run_import_adapter(args: argparse.Namespace) -> str:
    """PEFT -> a checkpoint without optimizer state, from which training can start."""
    from malora_dist.checkpoint.adapter_import import with_base, write_adapter_weights
    from malora_dist.hf.read import read_peft_adapter  # loads PEFT

    peft = read_peft_adapter(args.adapter)
    spec = dataclasses.replace(peft.spec, fuse_projections=args.fuse_projections)
    adapter = AdapterWeights(spec, peft.tensors, peft.base_model_name_or_path, peft.base_fingerprint, iteration=0)
    if args.base is not None:
        adapter = with_base(adapter, args.base)
    elif not adapter.base_fingerprint:
        raise CheckpointError(
            f"{args.adapter}: does not tell the fingerprint of its base; name the converted model with --base"
        )
    write_adapter_weights(args.megatron_path, adapter)
    origin = f"{spec.method}, base {adapter.base_model_name_or_path} with fingerprint {adapter.base_fingerprint[:12]}"
    return f"imported {len(adapter.tensors)} tensors ({origin}) into {args.megatron_path}"


def run_roundtrip(args: argparse.Namespace) -> str:
    """Hugging Face -> megatron -> Hugging Face, compared."""
    count = roundtrip(args.hf_model, args.megatron_path, args.hf_path, args.max_shard_bytes)
    return f"{count} tensors of {args.hf_model} are equal bit by bit after import and export"


def run_verify(args: argparse.Namespace) -> str:
    """Compare a converted base, or all checkpoints of a run, with their manifests."""
    findings = list(inspect(args.directory))
    for finding in findings:
        print(f"{finding.directory}: {finding.report}" if not finding.fault else f"damaged: {finding.fault}")
    damaged = sum(bool(finding.fault) for finding in findings)
    if damaged:
        raise CheckpointError(f"{args.directory}: {damaged} of {len(findings)} are damaged, see above")
    return f"verified {args.directory}"


#: {command: (what runs it, required options, optional ones)}.
COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], str], tuple[str, ...], tuple[str, ...]]] = {
    "import": (run_import, ("hf-model", "megatron-path"), ()),
    "export": (run_export, ("megatron-path", "hf-path"), ("max-shard-bytes",)),
    "export-adapter": (run_export_adapter, ("megatron-path", "hf-path"), ("hf-model",)),
    "import-adapter": (run_import_adapter, ("adapter", "megatron-path"), ("base", "fuse-projections")),
    "roundtrip": (run_roundtrip, ("hf-model",), ("megatron-path", "hf-path", "max-shard-bytes")),
    "verify": (run_verify, (), ()),
}
OPTIONS: dict[str, dict] = {
    "hf-model": {"type": path_argument, "metavar": "DIR", "help": "the Hugging Face model to read"},
    "megatron-path": {
        "type": path_argument,
        "metavar": "DIR",
        "help": "the converted base, or `save` of a run",
    },
    "hf-path": {"type": path_argument, "metavar": "DIR", "help": "the Hugging Face directory to write; must not exist"},
    "adapter": {"type": path_argument, "metavar": "DIR", "help": "the PEFT adapter to read"},
    "base": {"type": path_argument, "metavar": "DIR", "help": "the converted model that the adapter belongs to"},
    "fuse-projections": {"action": "store_true", "help": "store once what q, k, v and what gate, up have in common"},
    "max-shard-bytes": {"type": int, "default": DEFAULT_SHARD_BYTES, "help": "largest safetensors file"},
}


def build_parser() -> argparse.ArgumentParser:
    """One subcommand per conversion."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(dest="command", required=True)
    for command, (run, required, optional) in COMMANDS.items():
        subparser = subparsers.add_parser(command, help=run.__doc__, description=run.__doc__)
        for option in (*required, *optional):
            subparser.add_argument(f"--{option}", required=option in required, **OPTIONS[option])
        if command == "verify":
            subparser.add_argument(
                "directory", type=path_argument, help="a converted base, or the `save` directory of a run"
            )
        subparser.set_defaults(run=run)
    return parser


def _gigabytes(directory: Path) -> float:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file()) / 1e9


@exit_on_user_error
def main() -> None:
    """Run one conversion and say in one line what came of it."""
    args = build_parser().parse_args()
    start = time.monotonic()
    result = args.run(args)
    print(f"{result} in {time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    main()
