"""What the adapters send in one step, in bytes by group, against formulas made from the declarations.

Every expert is chosen (topk = N), so the rows sent are known without looking at the routing. Of a declaration the
formulas use the axes alone: which are sharded, how wide what is sent and returned is.
Everything is float32 or int64. Sizes are of the larger buffer of a collective (malora_dist/metrics/traffic.py).
"""

from __future__ import annotations

import json
from itertools import permutations, product
from math import prod
from pathlib import Path
from typing import Any

import pytest

from malora_dist.config import Config
from malora_dist.config_file import load_config
from malora_dist.exchange.all_to_all import AllToAll
from malora_dist.exchange.base import Site
from malora_dist.exchange.gather_experts import GatherExperts
from tests.layouts import METHODS, MIXTURES, Layout, find
from tests.test_parity import overrides
from tests.workers import WorkerPool

FLOAT, INT = 4, 8
H, FFN, KV = 32, 48, 16
WIDTHS = {
    "q_proj": (H, H), "k_proj": (H, KV), "v_proj": (H, KV), "o_proj": (H, H),
    "gate_proj": (H, FFN), "up_proj": (H, FFN), "down_proj": (FFN, H),
}  # fmt: skip
ROW, QKV = ("o_proj", "down_proj"), ("q_proj", "k_proj", "v_proj")


def style(projection: str) -> str:
    return "row" if projection in ROW else "column"


def tp_bytes(config: Config, projection: str, tokens: int, layout: Layout, layer: int) -> int:
    """Of one adapter, forward and backward of one microbatch of so many tokens, over all sequence shards."""
    if layout.tp == 1:
        return 0
    method = config.declared
    widths = method.widths(*WIDTHS[projection])
    crossing = 2 * tokens * widths[method.sent] * FLOAT  # x, or its product: gathered, reduce-scattered or exchanged
    if method.sent == "in" and projection in ROW:
        crossing //= layout.tp  # an all-to-all sends a rank's own features, the others' buffers are whole
    if method.sent == "in" and projection in ("k_proj", "v_proj", "up_proj"):
        crossing = 0  # x itself crosses once for all projections of a linear
    first = method.chain.project if method.chain else None
    if layer == 0 and projection in QKV and (first is None or not method.is_trained(first)):
        crossing //= 2  # the frozen embedding's output needs no gradient, nor does what is made of it here
    if method.is_mixture():
        crossing += 2 * tokens * method.num_experts * FLOAT  # logits
        crossing += 2 * method.num_experts * FLOAT  # f and p, forward only
    if projection in ROW:  # experts' parameters with an input axis are gathered, and their gradients scattered
        wide = [name for name, param in method.parameters.items() if param.is_expert and "in" in param.axes]
        experts = layout.ep if config.dispatch == "all_to_all" else 1
        for name in wide:
            gradient = method.is_trained(name)
            crossing += (1 + gradient) * prod(method.shape(name, *WIDTHS[projection])) // experts * FLOAT
    return crossing


def ep_bytes(config: Config, projection: str, tokens: int, layout: Layout) -> int:
    """Of one adapter on one rank; the ranks of the test have equally long microbatches."""
    method = config.declared
    if layout.ep == 1:
        return 0
    widths = method.widths(*WIDTHS[projection])
    gates = method.num_experts // layout.ep
    rows, back = tokens * layout.ep, widths[method.returned]  # one row per (token, rank), to all ranks
    if projection in ROW:
        rows //= layout.tp  # each TP rank works for its sequence shard
    else:
        back //= layout.tp  # each TP rank makes its part of the output
    counts = layout.ep * INT
    return counts + 2 * rows * (widths[method.sent] + gates + back) * FLOAT


def summed_over_tp(config: Config, projection: str) -> int:
    """Numbers in the trained parameters of an adapter whose gradients are summed over TP: those without a TP axis."""
    method = config.declared
    return sum(
        prod(method.shape(name, *WIDTHS[projection])) // (config.expert_model_parallel_size if param.is_expert else 1)
        for name, param in method.parameters.items()
        if method.is_trained(name) and param.placement(style(projection)).marks["sequence_parallel"]  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task whose samples are all equally long, so that the ranks' microbatches are."""
    file = tmp_path_factory.mktemp("words") / "words.jsonl"
    words = ["".join(word) for word in permutations("abcde")]
    file.write_text("".join(json.dumps({"prompt": f"{word}:", "completion": word[::-1]}) + "\n" for word in words))
    return file


def count(workers: WorkerPool, base: Path, words: Path, layout: Layout, *settings: str) -> list[dict[str, Any]]:
    wanted = overrides(
        base, [words], "topk=4", "global_batch_size=8", "dispatch=all_to_all", *layout.settings, *settings
    )
    return workers.run("count_traffic", layout.processes, overrides=wanted)


@pytest.mark.parametrize(
    ("name", "method"),
    [("TP 2", m) for m in METHODS] + [(row, m) for row in ("TP 2, EP 2", "EP 2") for m in MIXTURES],
)
def test_adapters(name: str, method: str, workers: WorkerPool, base_dir: Path, words: Path) -> None:
    """The traffic of all adapters less that of q_proj's alone, so that the base's falls out."""
    layout = find(name)
    settings = [f"method={method}", *layout.settings]
    every = count(workers, base_dir, words, layout, *settings)
    first = count(workers, base_dir, words, layout, *settings, "target_modules=[q_proj]")
    config = load_config(None, overrides(base_dir, [words], "topk=4", "dispatch=all_to_all", *settings))
    for both, one in zip(every, first, strict=True):
        expected = {"tp": 0, "ep": 0}
        for layer, projection in product(range(2), [p for p in WIDTHS if p != "q_proj"]):
            for b, s in both["shapes"]:
                expected["tp"] += tp_bytes(config, projection, b * s, layout, layer)
                expected["ep"] += ep_bytes(config, projection, b * s, layout)
            if layout.tp > 1:
                expected["tp"] += FLOAT * summed_over_tp(config, projection)
                # norms of a row-parallel weight, once per step
                expected["tp"] += FLOAT * WIDTHS[projection][1] * (config.declared.needs_norms() and projection in ROW)
        assert {group: both["bytes"].get(group, 0) - one["bytes"].get(group, 0) for group in expected} == expected


def site(config: Config, projection: str, layout: Layout, tokens: int) -> Site:
    return Site(
        config.declared,
        *WIDTHS[projection],
        style(projection),
        layout.tp,
        layout.ep,
        tokens,
        FLOAT,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("method", ["molora", "mo_asymmetric_lora", "malora"])
@pytest.mark.parametrize("name", ["TP 2, EP 2", "EP 2"])
def test_gathered_experts(name: str, method: str, workers: WorkerPool, base_dir: Path, words: Path) -> None:
    """Every expert once per step, and its gradient where it has one; two microbatches cost the same as one."""
    layout = find(name)
    settings = [f"method={method}", *layout.settings, "dispatch=gather_experts"]
    config = load_config(None, overrides(base_dir, [words], "topk=4", *settings))
    # two layers; the full copies of weights and gradients are what the collectives' larger buffers hold
    expected = 2 * sum(GatherExperts.bytes_held(site(config, projection, layout, 1)) for projection in WIDTHS)
    for batch in ("global_batch_size=4", "global_batch_size=8"):
        for rank in count(workers, base_dir, words, layout, *settings, batch):
            assert rank["bytes"]["ep"] == expected


@pytest.mark.parametrize("method", MIXTURES)
@pytest.mark.parametrize("name", ["TP 2, EP 2", "EP 2", "EP 4"])
def test_the_rule_of_auto_counts_these_bytes(name: str, method: str) -> None:
    """``AllToAll.bytes_sent`` against the formulas above, which are those of a run; what stays on its rank left out."""
    layout = find(name)
    config = Config(method=method, num_lora_experts=4, topk=4, expert_model_parallel_size=layout.ep)
    for projection in WIDTHS:
        crossing = (ep_bytes(config, projection, 64, layout) - layout.ep * INT) * (layout.ep - 1) / layout.ep
        assert AllToAll.bytes_sent(site(config, projection, layout, 64)) == pytest.approx(crossing)


def test_gradients_and_stages(workers: WorkerPool, base_dir: Path, words: Path) -> None:
    """dp: gradients of what is replicated. edp: of the experts. pp: the hidden states and their gradients."""
    layout = find("DP 4, EP 2")
    for rank in count(workers, base_dir, words, layout, *layout.settings):
        assert rank["bytes"]["edp"] == FLOAT * rank["experts"]
        assert rank["bytes"]["dp"] - FLOAT * rank["replicated"] <= 64  # and the counts of tokens
    layout = find("PP 2")
    for rank in count(workers, base_dir, words, layout, *layout.settings):
        sent = sum(b * s * H * FLOAT + 3 * INT for b, s in rank["shapes"])  # and its shape
        assert 0 <= rank["bytes"]["pp"] - sent <= 64
