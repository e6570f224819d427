"""What the other benchmarks measured of the parts that the model of scaling.py is made of.

Their results are read where they exist. The formulas are held against counts and times of whatever machine they come
from; a rate of the cluster is taken over only if it was measured on a GPU.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from models import llama_like
from scaling_cluster import Cluster
from scaling_parts import FP32, Model
from scaling_search import sent_bytes

from malora_dist.methods.spec import AdapterSpec

#: {way of dispatch.py: (method, dispatch)}
WAYS = {
    "low-rank": ("malora", "all_to_all"),
    "x-wide": ("molora", "all_to_all"),
    "gather": ("malora", "gather_experts"),
}
NOMINAL_RATES = {"100Mbit": 100e6 / 8, "1Gbit": 1e9 / 8}


class Measured(NamedTuple):
    """A figure, what the model has in its place, and which file it is from."""

    part: str
    value: float
    modelled: float
    source: str


def measured_rates(results: Path, cluster: Cluster) -> dict[str, float]:
    """Fields of the cluster measured on a GPU: the share of its peak that LoRA's step reached in bfloat16."""
    found = _read(results / "step_time.json")
    if found is None or found["device"] != "cuda" or not found["bf16"]:
        return {}
    reached = max(methods["lora"]["flop_per_second"] for methods in found["figures"].values())
    return {"gemm_efficiency": reached / cluster.bf16_flops}


def measured_parts(results: Path, cluster: Cluster) -> list[Measured]:
    """All that the result files of this folder say."""
    readers = {"step_time": _steps, "dispatch": _dispatches, "two_nodes": _links}
    found = {name: _read(results / f"{name}.json") for name in readers}
    return [part for name, read in readers.items() if (content := found[name]) for part in read(content, cluster)]


def _read(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text()) if file.is_file() else None


def _steps(found: dict[str, Any], cluster: Cluster) -> Iterator[Measured]:
    """Step times over those of the counted operations."""
    source = f"step_time.json, {found['device']}"
    for label, methods in found["figures"].items():
        for name, figures in methods.items():
            if name != "lora" and "to_lora" in figures:
                ratio = figures["to_lora"]["median"] / figures["floor"]
                yield Measured(f"{name}/lora over the ratio of their operations, {label}", ratio, 1.0, source)


def _dispatches(found: dict[str, Any], cluster: Cluster) -> Iterator[Measured]:
    """Bytes counted over those of the formulas, and how much of a transfer the GEMM beside it hid."""
    model = Model.of(llama_like(found["hidden_size"], found["layers"]))
    for way, (method, dispatch) in WAYS.items():
        ratios = []
        for ep, of_experts in found["steps"].items():
            for experts, of_tokens in of_experts.items():
                spec = AdapterSpec(method=method, num_lora_experts=int(experts))
                for tokens, ways in of_tokens.items():
                    sent = sent_bytes(model, spec, dispatch, int(ep), int(tokens), FP32)
                    counted = ways[way]["bytes"] * (int(ep) - 1) / int(ep)  # without what a rank keeps
                    ratios.append(counted / sent)
        yield Measured(f"bytes counted over the formula, {way}", statistics.median(ratios), 1.0, "dispatch.json, cpu")
    overlap = found["overlap"]
    seconds = {name: part["median"] for name, part in (overlap["parts"] | overlap["measured"]).items()}
    saved = seconds["nothing hidden"] - seconds["back behind the GEMM"]
    share = saved / min(seconds["gemm"], seconds["back"])
    yield Measured("share of the way back hidden behind the GEMM", share, cluster.overlap, "dispatch.json, cpu")


def _links(found: dict[str, Any], cluster: Cluster) -> Iterator[Measured]:
    """Rates reached, and what x-wide all_to_all takes beyond gather_experts over what its bytes take at that rate."""
    for link, figures in found["links"].items():
        source, modes = f"two_nodes.json, {link}/s", figures["modes"]
        wide, gathered = modes["molora_all_to_all"], modes["malora_gather_experts"]
        reached = figures["bytes_per_second"] / NOMINAL_RATES[link]
        yield Measured("share of a link's rate reached", reached, cluster.link_efficiency, source)
        seconds = wide["step"]["median"] - gathered["step"]["median"]
        expected = (wide["wire_bytes"] - gathered["wire_bytes"]) / figures["bytes_per_second"]
        yield Measured("x-wide all_to_all beyond gather, over its bytes at that rate", seconds / expected, 1.0, source)
