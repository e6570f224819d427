"""Peak memory of `convert_hf.py import` and `export`, each in a process of its own, on a random Llama in bfloat16.

    python tools/benchmarks/conversion_memory.py --gb 1.2

Writes the model to a temporary directory (three times its size in all, deleted at the end) and the figures to
tools/benchmarks/results/conversion_memory.json. Linux only.

What is counted: the process's resident memory at its highest (VmHWM) above that after its imports. That is its own
memory and the pages of the files it has mapped, as safetensors files are while they are read; not the page cache.
Each conversion runs several times, since what the allocator keeps of freed memory varies; the highest peak is printed.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from malora_dist.checkpoint.convert import export_hf, import_hf
from malora_dist.families.conversion import conversion_map
from malora_dist.families.llama import Llama

RESULTS = Path(__file__).parent / "results" / "conversion_memory.json"
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def llama_config(nbytes: float) -> LlamaConfig:
    """Llama-3.2-1B's layers and Llama 2's vocabulary, untied; as many layers as make `nbytes` in bfloat16."""
    fields = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 2048, "intermediate_size": 8192, "vocab_size": 32000,
        "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 1, "torch_dtype": "bfloat16",
    }  # fmt: skip
    config = LlamaConfig.from_dict(fields)
    while 2 * sum(torch.Size(shape).numel() for shape in shapes(config).values()) < nbytes:
        config.num_hidden_layers += 1
    return config


def shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """{Hugging Face key: shape} of a model."""
    return {key: shape for chunk in conversion_map(Llama(config)) for key, shape in chunk.hf_shapes.items()}


def write_model(config: LlamaConfig, directory: Path) -> None:
    """A random model, one file a layer, so that no more than one layer is held."""
    directory.mkdir()
    weight_map: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)
    for layer, chunks in itertools.groupby(conversion_map(Llama(config)), key=lambda chunk: chunk.layer):
        file = f"model-{'ends' if layer is None else layer}.safetensors"
        tensors = {
            key: torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
            for chunk in chunks
            for key, shape in chunk.hf_shapes.items()
        }
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.save_pretrained(directory)


def resident(field: str) -> int:
    """Bytes in a field of /proc/self/status: VmRSS now, VmHWM at its highest."""
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def run_conversion(kind: str, source: Path, target: Path, max_shard_bytes: int) -> dict[str, float]:
    """One conversion in this process: its peak and its seconds."""
    CLEAR_REFS.write_text("5")  # forget the peak of the imports
    start, started = resident("VmRSS"), time.monotonic()
    if kind == "import":
        import_hf(source, target)
    else:
        export_hf(source, target, max_shard_bytes)
    return {"peak_bytes": resident("VmHWM") - start, "seconds": round(time.monotonic() - started, 1)}


def run_in_children(repeats: int, *arguments: object) -> list[dict[str, float]]:
    """:func:`run_conversion` so many times, each in a fresh process; the target is removed before each."""
    command = [sys.executable, __file__, "--child", *map(str, arguments)]
    results = []
    for _ in range(repeats):
        shutil.rmtree(str(arguments[2]), ignore_errors=True)
        results.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
    return results


def machine() -> dict[str, Any]:
    """Hardware and versions."""
    cpu = next(
        (s.split(":")[1].strip() for s in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in s), ""
    )
    packages = ("torch", "safetensors", "transformers")
    return {
        "cpu": cpu or platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
    }


def measure(nbytes: float, max_shard_bytes: int, repeats: int, scratch: Path) -> dict[str, Any]:
    """Both conversions of a model of `nbytes`."""
    config = llama_config(nbytes)
    sizes = [2 * torch.Size(shape).numel() for shape in shapes(config).values()]
    write_model(config, scratch / "llama")
    return {
        "date": datetime.date.today().isoformat(),
        **machine(),
        "model_bytes": sum(sizes),
        "num_hidden_layers": config.num_hidden_layers,
        "largest_tensor_bytes": max(sizes),
        "largest_fused_tensor_bytes": max(
            2 * torch.Size(chunk.shape).numel() for chunk in conversion_map(Llama(config))
        ),
        "max_shard_bytes": max_shard_bytes,
        "import": run_in_children(repeats, "import", scratch / "llama", scratch / "base", max_shard_bytes),
        "export": run_in_children(repeats, "export", scratch / "base", scratch / "back", max_shard_bytes),
    }


def main() -> None:
    """Measure, print and write down."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.2, help="least size of the model")
    parser.add_argument("--max-shard-bytes", type=int, default=200_000_000, help="as of `convert_hf.py export`")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each conversion")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file to write")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        kind, source, target, max_shard_bytes = args.child
        print(json.dumps(run_conversion(kind, Path(source), Path(target), int(max_shard_bytes))))
        return
    with tempfile.TemporaryDirectory(prefix="malora-conversion-") as scratch:
        result = measure(args.gb * 1e9, args.max_shard_bytes, args.repeats, Path(scratch))
    for name in ("import", "export"):
        worst = max(result[name], key=lambda run: run["peak_bytes"])
        print(f"{name}: peak {worst['peak_bytes'] / 1e6:.0f} MB above the imports, {worst['seconds']} s")
    for name in ("model", "largest_tensor", "largest_fused_tensor"):
        print(f"{name}: {result[f'{name}_bytes'] / 1e6:.0f} MB")
    args.output.parent.mkdir(exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
