"""What the adapters send in one step, in bytes by group, against formulas; nothing hidden-wide crosses TP.

Every expert is chosen (topk = N), so the rows sent are known without looking at the routing.
T: tokens of a microbatch, over all sequence shards; widths n and m are full; d, N, r, r' as in
malora_dist/methods/spec.py. Everything is float32 or int64. Sizes are of the larger buffer of a collective
(malora_dist/metrics/traffic.py).
"""

from __future__ import annotations

import json
from itertools import permutations
from math import prod
from pathlib import Path
from typing import Any

import pytest

from malora_dist.config import Config
from malora_dist.config_file import load_config
from malora_dist.exchange.cost import AdapterShape, all_to_all_bytes, gathered_memory
from tests.layouts import Layout, find
from tests.test_parity import overrides
from tests.workers import WorkerPool

FLOAT, INT = 4, 8
H, FFN, KV = 32, 48, 16
WIDTHS = {
    "q_proj": (H, H), "k_proj": (H, KV), "v_proj": (H, KV), "o_proj": (H, H),
    "gate_proj": (H, FFN), "up_proj": (H, FFN), "down_proj": (FFN, H),
}  # fmt: skip
ROW = ("o_proj", "down_proj")


def tp_bytes(config: Config, projection: str, tokens: int, layout: Layout) -> int:
    """Of one adapter, forward and backward of one microbatch."""
    n_experts = config.num_experts
    if not config.is_mixture:
        return 2 * tokens * config.lora_rank * FLOAT
    aux = 2 * n_experts * FLOAT  # f and p, forward only
    if config.method == "malora":
        return 2 * tokens * (config.shared_dim + n_experts) * FLOAT + aux
    # MoLoRA: inner values of the experts at hand, r of each, for the rows of all expert-parallel ranks.
    inner = 2 * tokens * layout.ep * (n_experts // layout.ep) * config.lora_rank * FLOAT
    if projection in ROW:  # logits: reduce-scattered, then gathered, with gradients
        return inner + 4 * tokens * n_experts * FLOAT + aux
    return inner + tokens * config.topk * INT + aux  # which experts, forward only


def ep_bytes(config: Config, projection: str, tokens: int, layout: Layout) -> int:
    """Of one adapter on one rank; the ranks of the test have equally long microbatches."""
    n, m = WIDTHS[projection]
    gates = config.num_experts // layout.ep
    rows = tokens * layout.ep  # one per (token, rank), to all ranks
    counts = layout.ep * INT
    if config.method == "malora":
        if projection in ROW:
            rows //= layout.tp  # each TP rank works for its sequence shard
        else:
            m //= layout.tp  # each TP rank makes its part of the output
        return counts + 2 * rows * (config.shared_dim + gates + m) * FLOAT
    if projection in ROW:
        out, back = rows * (n // layout.tp + gates), rows // layout.tp * m
    else:
        out, back = rows // layout.tp * (n + gates), rows * (m // layout.tp)
    if layout.tp > 1:
        counts += layout.ep * layout.tp * INT  # rows by sequence shard
    return counts + 2 * (out + back) * FLOAT


def summed_over_tp(config: Config, projection: str) -> int:
    """Numbers in the gradients of an adapter that are summed over TP: the table of docs/architecture.md."""
    replicated = ("B", "P") if projection in ROW else ("router", "S", "P", "A")
    total = 0
    for name in config.parameter_names:
        if name in replicated:
            is_expert = config.is_mixture and name in ("P", "A", "B")
            numbers = prod(config.parameter_shape(name, *WIDTHS[projection]))
            total += numbers // (config.expert_model_parallel_size if is_expert else 1)
    return total


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


@pytest.mark.parametrize("method", ["lora", "molora", "malora"])
@pytest.mark.parametrize("name", ["TP 2", "TP 2, EP 2", "EP 2"])
def test_adapters(name: str, method: str, workers: WorkerPool, base_dir: Path, words: Path) -> None:
    """The traffic of all adapters less that of q_proj's alone, so that the base's falls out."""
    layout = find(name).of(method)
    settings = [f"method={method}", *layout.settings]
    every = count(workers, base_dir, words, layout, *settings)
    first = count(workers, base_dir, words, layout, *settings, "target_modules=[q_proj]")
    config = load_config(None, overrides(base_dir, [words], "topk=4", *settings))
    for both, one in zip(every, first, strict=True):
        expected = {"tp": 0, "ep": 0}
        for projection in [p for p in WIDTHS if p != "q_proj"] * 2:  # layers
            for b, s in both["shapes"]:
                expected["tp"] += tp_bytes(config, projection, b * s, layout)
                expected["ep"] += ep_bytes(config, projection, b * s, layout)
            expected["tp"] += FLOAT * summed_over_tp(config, projection)
        expected = {group: number if getattr(layout, group) > 1 else 0 for group, number in expected.items()}
        assert {group: both["bytes"].get(group, 0) - one["bytes"].get(group, 0) for group in expected} == expected


@pytest.mark.parametrize("method", ["molora", "malora"])
@pytest.mark.parametrize("name", ["TP 2, EP 2", "EP 2"])
def test_gathered_experts(name: str, method: str, workers: WorkerPool, base_dir: Path, words: Path) -> None:
    """Every expert once per step, and its gradient; two microbatches cost the same as one."""
    layout = find(name)
    settings = [f"method={method}", *layout.settings, "dispatch=gather_experts"]
    config = load_config(None, overrides(base_dir, [words], "topk=4", *settings))
    expected = 0
    for projection, (n, m) in WIDTHS.items():
        shape = AdapterShape(n, m, projection not in ROW, layout.tp)
        expected += 2 * gathered_memory(config, shape)  # two layers; weights and gradients
    for batch in ("global_batch_size=4", "global_batch_size=8"):
        for rank in count(workers, base_dir, words, layout, *settings, batch):
            assert rank["bytes"]["ep"] == expected


@pytest.mark.parametrize("method", ["molora", "malora"])
@pytest.mark.parametrize("name", ["TP 2, EP 2", "EP 2", "EP 4"])
def test_the_rule_of_auto_counts_these_bytes(name: str, method: str) -> None:
    """exchange/cost.py against the formulas above, which are those of a run; what stays on its rank left out."""
    layout = find(name)
    config = Config(method=method, num_lora_experts=4, topk=4, expert_model_parallel_size=layout.ep)
    for projection, (n, m) in WIDTHS.items():
        shape = AdapterShape(n, m, projection not in ROW, layout.tp)
        counts = layout.ep * INT * (1 + layout.tp if method == "molora" and layout.tp > 1 else 1)
        crossing = (ep_bytes(config, projection, 64, layout) - counts) * (layout.ep - 1) / layout.ep
        assert all_to_all_bytes(config, shape, layout.ep, 64, FLOAT) == pytest.approx(crossing)


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
