"""Training on every layout equals the one-process oracle: losses, gradients, parameters, routing counts.

All runs are float32. Tolerances: the layouts sum the same float32 numbers in another order; over
the few thousand terms of these tiny models that moves a tensor by some 1e-6 to 1e-5 of its largest
entry. A wrong mark or a lost reduction moves it by factors between 0.2 and 2.2, four orders above
the bar of 1e-4. What Adam makes of a step's rounding enters the next step: seen on eight layers, the
largest difference doubles or more per step, from 6e-6 to 2e-4 in four, hence three steps.
adam_eps is 1e-3, because Adam with a small epsilon turns the rounding of near-zero
gradients into full steps. Routing is the same only if no token sits on a tie, so every test checks
the margin.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from malora_dist.checkpoint.convert import import_hf
from malora_dist.config import Config
from malora_dist.config_file import load_config
from malora_dist.data.batches import BatchLayout, Microbatch, train_microbatches
from malora_dist.data.dataset import load_tasks
from malora_dist.data.schedule import SampleSchedule
from malora_dist.methods.base import METHODS as REGISTERED
from tests.conftest import write_llama
from tests.layouts import LAYOUTS, METHODS, Layout, dispatches, find
from tests.oracle import OracleRun, Record
from tests.workers import WorkerPool

STEPS = 3
RTOL = 1e-4
TIE_MARGIN = 1e-6
ABLATIONS = [name for name, method in REGISTERED.items() if method.is_ablation]
DEVICE = os.environ.get("MALORA_TEST_DEVICE", "cpu")  # launch/gpu_check.sh sets it


def overrides(base: Path, files: list[Path], *more: str) -> list[str]:
    data = ",".join(f"{{path: {file}}}" for file in files)
    return [
        f"pretrained_checkpoint={base}", f"data=[{data}]", f"device={DEVICE}", "seq_length=48", "validation_samples=8",
        "micro_batch_size=2", "global_batch_size=16", "lr=0.01", "weight_decay=0.1", "clip_grad=1.0",
        "lr_decay_style=constant", "adam_eps=1e-3",
        "num_lora_experts=4", "topk=2", "lora_rank=4", "shared_dim=6", "aux_loss_coeff=0.1",
        *more,
    ]  # fmt: skip


def global_steps(config: Config, llama_dir: Path, steps: int) -> list[list[Microbatch]]:
    """The microbatches of the global batch of each step, as one process sees them."""
    tokenizer = AutoTokenizer.from_pretrained(llama_dir)
    tasks = load_tasks(config, tokenizer, config.seed)
    schedule = SampleSchedule([len(t.train) for t in tasks], [t.weight for t in config.data], config.seed)
    layout = BatchLayout(config.micro_batch_size, tokenizer.pad_token_id, multiple_of=8)
    return [
        train_microbatches(tasks, schedule, i * config.global_batch_size, config.global_batch_size, layout)
        for i in range(steps)
    ]


class Bench:
    """Runs a training on a layout and its one-process reference; references are kept for other layouts."""

    def __init__(self, workers: WorkerPool, task_files: list[Path], directory: Path) -> None:
        self._workers, self._task_files, self._directory = workers, task_files, directory
        self._references: dict[tuple[Any, ...], tuple[int, Record]] = {}

    def base(self, layers: int) -> tuple[Path, Path]:
        """(Hugging Face directory, converted base) of a Llama with so many layers."""
        llama, base = self._directory / f"llama{layers}", self._directory / f"base{layers}"
        if not base.exists():
            import_hf(write_llama(llama, num_hidden_layers=layers), base)
        return llama, base

    def settings(self, layers: int, *more: str) -> list[str]:
        """Eight samples a step, or as many as the four interleaved stages of the eight-layer model want."""
        batch = f"global_batch_size={16 if layers == 8 else 8}"
        return overrides(self.base(layers)[1], self._task_files, batch, *more)

    def reference(self, layers: int, *adapter: str, steps: int = STEPS) -> tuple[int, Record]:
        """(seed, record) of the oracle: the first seed with which no token sits near a routing tie."""
        key = (layers, steps, *adapter)
        for seed in range(1234, 1264):
            if key in self._references:
                break
            config = load_config(None, self.settings(layers, *adapter, f"seed={seed}"))
            llama = self.base(layers)[0]
            record = OracleRun(llama, config, seed).train(global_steps(config, llama, steps), config)
            if record.smallest_margin > TIE_MARGIN:
                self._references[key] = seed, record
        return self._references[key]

    def run(
        self,
        layout: Layout,
        *adapter: str,
        extra: Sequence[str] = (),
        steps: int = STEPS,
        job: str = "train_and_record",
        **options: Any,
    ) -> tuple[list[dict[str, Any]], Record]:
        """(what each rank recorded, the reference); `extra` settings must not change the reference."""
        seed, record = self.reference(layout.layers, *adapter, steps=steps)
        settings = self.settings(layout.layers, *adapter, *layout.settings, *extra, f"seed={seed}")
        return self._workers.run(job, layout.processes, overrides=settings, steps=steps, **options), record

    def run_with_dropout(
        self, layout: Layout, *adapter: str, extra: Sequence[str], steps: int
    ) -> tuple[list[dict[str, Any]], Record]:
        """As :meth:`run`, the reference with the masks that the run drew; the first seed without a routing tie."""
        llama = self.base(layout.layers)[0]
        for seed in range(1234, 1244):
            settings = self.settings(layout.layers, *adapter, *layout.settings, *extra, f"seed={seed}")
            results = self._workers.run(
                "train_and_record",
                layout.processes,
                overrides=settings,
                steps=steps,
                keep_inputs=False,
                keep_masks=True,
            )
            config = load_config(None, settings)
            masks = dropout_masks(results, steps, config.recompute_granularity == "full", config.micro_batch_size)
            record = OracleRun(llama, config, seed, masks).train(global_steps(config, llama, steps), config)
            if record.smallest_margin > TIE_MARGIN:
                return results, record
        raise AssertionError("a token sits on a routing tie with every seed")


@pytest.fixture(scope="module")
def bench(workers: WorkerPool, task_files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(workers, task_files, tmp_path_factory.mktemp("bench"))


def assemble(results: list[dict[str, Any]], pick: Any) -> dict[str, Tensor]:
    """Full tensors from the shards of all ranks; replicas must be equal bit by bit."""
    full: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    for result in results:
        for key, (where, shape, shard) in pick(result).items():
            tensor = full.setdefault(key, torch.zeros(shape))
            mask = seen.setdefault(key, torch.zeros(shape, dtype=torch.bool))
            already = mask[where]
            assert torch.equal(tensor[where][already], shard[already]), f"{key}: replicas differ"
            tensor[where] = shard
            mask[where] = True
    for key, mask in seen.items():
        assert mask.all(), f"{key}: a part lies on no rank"
    return full


def close(name: str, got: Tensor, expected: Tensor, rtol: float = RTOL) -> None:
    """Within ``rtol`` of the tensor's largest entry."""
    scale = expected.abs().max().clamp(min=1e-6)
    error = float((got - expected).abs().max() / scale)
    assert error < rtol, f"{name}: off by {error:.2e} of its largest entry"


def compare_without_input(results: list[dict[str, Any]], expected: Record) -> None:
    for result in results:
        assert result["losses"] == pytest.approx(expected.losses, rel=1e-5)
        assert result["grad_norms"] == pytest.approx(expected.grad_norms, rel=RTOL)
        assert result["counts"] == expected.counts, "top-k slots by task and expert"
    for step, grads in enumerate(expected.grads):
        got = assemble(results, lambda r, step=step: r["grads"][step])
        assert set(got) == set(grads)
        for key, grad in grads.items():
            close(f"step {step}, gradient of {key}", got[key], grad)
    got = assemble(results, lambda r: r["parameters"])
    assert set(got) == set(expected.parameters)
    for key, parameter in expected.parameters.items():
        close(f"parameter {key}", got[key], parameter)


def compare(results: list[dict[str, Any]], expected: Record) -> None:
    compare_without_input(results, expected)
    compare_input_gradients(results, expected)


def dropout_masks(results: list[dict[str, Any]], steps: int, recomputed: bool, rows: int) -> dict[Any, Tensor]:
    """What an input was multiplied with, [rows, s, n] by (step, microbatch of the global batch, site).

    A column-parallel adapter meets the sequence in shards, a row-parallel one the features. With
    recompute each mask comes twice, and both are the same.
    """
    shards: dict[Any, dict[int, Tensor]] = {}
    styles: dict[str, str] = {}
    dp_size = 1 + max(result["place"]["dp"] for result in results)
    for result in results:
        by_site: dict[str, list[Tensor]] = {}
        for site, style, mask in result["masks"]:
            styles[site] = style
            by_site.setdefault(site, []).append(mask.unflatten(0, (-1, rows)))
        for site, found in by_site.items():
            if recomputed:
                distinct = [m for i, m in enumerate(found) if not any(torch.equal(m, other) for other in found[:i])]
                assert len(distinct) * 2 == len(found), f"{site}: a mask changed when recomputed"
                found = distinct
            per_step = len(found) // steps
            for i, mask in enumerate(found):
                place = i // per_step, i % per_step * dp_size + result["place"]["dp"], site
                shards.setdefault(place, {})[result["place"]["tp"]] = mask
    return {
        place: torch.cat([by_tp[tp] for tp in sorted(by_tp)], dim=0 if styles[place[2]] == "column" else 2).transpose(
            0, 1
        )
        for place, by_tp in shards.items()
    }


def compare_input_gradients(results: list[dict[str, Any]], expected: Record) -> None:
    """Of the embeddings, per step and microbatch; rank r of DP has microbatches r, r + DP, ..."""
    first = [r for r in results if r["place"]["pp"] == 0]
    dp_size = 1 + max(r["place"]["dp"] for r in first)
    for step, grads in enumerate(expected.input_grads):
        for index, grad in enumerate(grads):
            shards = sorted((r for r in first if r["place"]["dp"] == index % dp_size), key=lambda r: r["place"]["tp"])
            got = torch.cat([r["input_grads"][step][index // dp_size] for r in shards]).transpose(0, 1)
            # Interleaved stages pad the microbatches of a step to one length.
            assert not got[:, grad.shape[1] :].any()
            got = got[:, : grad.shape[1]]
            close(f"step {step}, input gradient of microbatch {index}", got, grad)


def travelling(layout: str) -> str:
    """With sharded experts the dispatch that moves tokens; in these tiny models auto would always gather."""
    return "all_to_all" if find(layout).ep > 1 else "auto"


@pytest.mark.parametrize(
    ("layout", "method", "dispatch"),
    [(row, method, dispatch) for row in LAYOUTS for method in row.methods for dispatch in dispatches(row, method)],
    ids=str,
)
def test_layout(layout: Layout, method: str, dispatch: str, bench: Bench) -> None:
    """The table of docs/layouts.md."""
    compare(*bench.run(layout, f"method={method}", extra=[f"dispatch={dispatch}"]))


@pytest.mark.parametrize("method", ABLATIONS)
@pytest.mark.parametrize("dispatch", ["all_to_all", "gather_experts"])
def test_ablations(dispatch: str, method: str, bench: Bench) -> None:
    """The paper's table 3. Those that are no chain of two matrices are computed by their own functions."""
    settings = [f"method={method}", "shared_dim=8"]
    compare(*bench.run(find("TP 2, EP 2"), *settings, extra=[f"dispatch={dispatch}"], steps=2))


@pytest.mark.parametrize("frozen", ["S", "P"])
@pytest.mark.parametrize("dispatch", ["all_to_all", "gather_experts"])
def test_frozen_parameters(dispatch: str, frozen: str, bench: Bench) -> None:
    """Shared by all ranks, or sharded and gathered without a gradient."""
    settings = ["method=malora", f"freeze=[{frozen}]"]
    compare(*bench.run(find("EP 2"), *settings, extra=[f"dispatch={dispatch}"], steps=2))


def test_gates_that_are_not_renormalised(bench: Bench) -> None:
    """As equation 4 has them."""
    settings = ["method=malora", "norm_topk_prob=false", "beta=1.25"]
    compare(*bench.run(find("EP 2"), *settings, extra=["dispatch=all_to_all"], steps=2))


@pytest.mark.parametrize("method", ["molora", "hydralora", "malora"])
@pytest.mark.parametrize("layout", ["1 process", "EP 2", "TP 2, EP 2"])
def test_grouped_experts(layout: str, method: str, bench: Bench) -> None:
    """Tokens sorted by expert, also those that arrived from other ranks."""
    extra = ["expert_compute=grouped", "dispatch=all_to_all"]
    compare(*bench.run(find(layout), f"method={method}", extra=extra, steps=2))


@pytest.mark.parametrize("layout", ["EP 2", "TP 2, EP 2"])
@pytest.mark.parametrize("form", ["gated_block", "grouped"])
def test_fastmoe(form: str, layout: str, bench: Bench) -> None:
    """Through the double, which insists on contiguous gradients as fmoe's native code does.

    d = 6 is padded for grouped_mm: what comes back of it is a slice.
    """
    extra = [f"expert_compute={form}", "dispatch=fastmoe"]
    compare(*bench.run(find(layout), "method=malora", extra=extra, steps=2, fmoe_double=True))


@pytest.mark.parametrize("method", ["molora", "malora"])
@pytest.mark.parametrize("extra", ["recompute_granularity=full", "use_distributed_optimizer=true"])
def test_gathered_experts_with(extra: str, method: str, bench: Bench) -> None:
    settings = ["dispatch=gather_experts", extra]
    results = bench.run(find("TP 2, EP 2"), f"method={method}", extra=settings, steps=2, keep_inputs=False)
    if "optimizer" in extra:  # a rank holds the gradients of its own shard only
        results = [{**rank, "grads": []} for rank in results[0]], Record(**{**vars(results[1]), "grads": []})
    compare_without_input(*results)


@pytest.mark.parametrize("method", ["molora", "malora"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_linears_of_both_dispatches(recompute: str, method: str, bench: Bench) -> None:
    """As auto may choose: qkv and fc1 gather their experts, proj and fc2 send their tokens."""
    extra = ["dispatch=auto", f"recompute_granularity={recompute}"]
    results = bench.run(
        find("TP 2, EP 2"), f"method={method}", extra=extra, steps=2, keep_inputs=False, mixed_dispatch=True
    )
    compare_without_input(*results)


@pytest.mark.parametrize("method", ["molora", "malora"])
@pytest.mark.parametrize("layout", ["1 process", "EP 4", "TP 2, EP 2"])
def test_top_1(layout: str, method: str, bench: Bench) -> None:
    compare(*bench.run(find(layout), f"method={method}", "topk=1", extra=["dispatch=all_to_all"], steps=2))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("layout", "dispatch"), [("1 process", "auto"), ("TP 2, EP 2", "auto"), ("EP 2", "all_to_all")]
)
def test_fused_projections(layout: str, dispatch: str, method: str, bench: Bench) -> None:
    extra = [f"dispatch={dispatch}"]
    compare(*bench.run(find(layout).of(method), f"method={method}", "fuse_projections=true", extra=extra, steps=2))


@pytest.mark.parametrize(
    ("layout", "dispatch"), [("1 process", "auto"), ("TP 2, EP 2", "all_to_all"), ("TP 2, EP 2", "gather_experts")]
)
@pytest.mark.parametrize("qkv", ["k_proj,v_proj", "q_proj,v_proj"])
@pytest.mark.parametrize("fused", ["false", "true"])
def test_adapters_on_some_projections_only(layout: str, dispatch: str, qkv: str, fused: str, bench: Bench) -> None:
    """Two, adjacent or not, inside the fused qkv, up inside fc1, and fc2: the others get no delta."""
    targets, extra = f"target_modules=[{qkv},up_proj,linear_fc2]", [f"dispatch={dispatch}"]
    compare(*bench.run(find(layout), targets, f"fuse_projections={fused}", extra=extra, steps=1))


RECOMPUTE = {
    "full, uniform": ["recompute_granularity=full"],
    "full, units of 2": ["recompute_granularity=full", "recompute_num_layers=2"],  # both layers
    "full, block": ["recompute_granularity=full", "recompute_method=block"],
    "selective, core_attn": ["recompute_granularity=selective"],
    "selective, mlp": ["recompute_granularity=selective", "recompute_modules=[mlp]"],
    "selective, both": ["recompute_granularity=selective", "recompute_modules=[core_attn,mlp]"],
}


@pytest.mark.parametrize("layout", ["1 process", "TP 2, EP 2", "PP 2", "PP 2 interleaved", "TP 2, PP 2"])
@pytest.mark.parametrize("kind", RECOMPUTE)
def test_recompute(kind: str, layout: str, bench: Bench) -> None:
    """Also with one stage, whose frozen embedding gives the first layer an input without a gradient.

    With PP a stage recomputes for one microbatch when it has gone on to others, of other padding.
    """
    if "PP" in layout and kind == "full, units of 2":
        pytest.skip("refused, see tests/test_errors_layout.py")
    extra = [*RECOMPUTE[kind], f"dispatch={travelling(layout)}"]
    compare_without_input(*bench.run(find(layout), "method=malora", extra=extra, steps=2, keep_inputs=False))


@pytest.mark.parametrize("targets", ["[down_proj]", "[o_proj]"])
@pytest.mark.parametrize("kind", ["full, uniform", "selective, both"])
def test_recompute_with_few_adapters(kind: str, targets: str, bench: Bench) -> None:
    """The input of what is recomputed depends on no adapter."""
    settings = ["method=malora", f"target_modules={targets}"]
    compare_without_input(*bench.run(find("1 process"), *settings, extra=RECOMPUTE[kind], steps=1, keep_inputs=False))


@pytest.mark.parametrize("method", ["lora", "dora", "molora", "malora"])
@pytest.mark.parametrize("layout", ["1 process", "TP 2, EP 2", "PP 2"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_dropout(recompute: str, layout: str, method: str, bench: Bench) -> None:
    """With the masks that the run drew, put together from all ranks, the oracle gets the same gradients.

    So every token saw one mask per adapter, whatever TP rank worked on it, also when recomputed.
    """
    settings = [f"method={method}", "lora_dropout=0.25"]
    dispatch = travelling(layout) if REGISTERED[method].is_mixture() else "auto"
    extra = [f"recompute_granularity={recompute}", f"dispatch={dispatch}"]
    results, expected = bench.run_with_dropout(find(layout).of(method), *settings, extra=extra, steps=1)
    assert any((mask == 0).any() for result in results for _, _, mask in result["masks"])
    compare_without_input(results, expected)


def test_tied_embeddings_and_a_padded_vocabulary_over_tensor_and_pipeline_ranks(
    workers: WorkerPool, task_files: list[Path], tmp_path: Path
) -> None:
    """51 tokens on TP=2 are padded to 52; the padding must get no probability."""
    llama = write_llama(tmp_path / "llama", vocab_size=51, tie_word_embeddings=True)
    import_hf(llama, tmp_path / "megatron")
    settings = overrides(tmp_path / "megatron", task_files, *find("TP 2, PP 2").settings)
    config = load_config(None, settings)
    expected = OracleRun(llama, config, config.seed).train(global_steps(config, llama, 2), config)
    assert expected.smallest_margin > TIE_MARGIN
    compare(workers.run("train_and_record", 4, overrides=settings, steps=2), expected)


@pytest.mark.parametrize(
    ("family", "method"), [("mistral", "malora"), ("qwen2", "malora"), ("qwen2", "dora"), ("qwen3", "malora")]
)
def test_families(family: str, method: str, workers: WorkerPool, task_files: list[Path], tmp_path: Path) -> None:
    """What a family has of its own, with the weights that start at ones and zeros made random."""
    # transformers reads any tokenizer of a qwen2 as Qwen2Tokenizer, which has a 51st token.
    hf = write_llama(tmp_path / "hf", model_type=family, vocab_size=51)
    weights = load_file(hf / "model.safetensors")
    torch.manual_seed(0)
    for weight in weights.values():
        if weight.dim() == 1:
            weight += 0.3 * torch.randn_like(weight)
    save_file(weights, hf / "model.safetensors", {"format": "pt"})
    import_hf(hf, tmp_path / "megatron")
    for seed in range(1234, 1244):
        more = [*find("TP 2, PP 2").settings, f"method={method}", f"seed={seed}"]
        settings = overrides(tmp_path / "megatron", task_files, *more)
        config = load_config(None, settings)
        expected = OracleRun(hf, config, seed).train(global_steps(config, hf, 2), config)
        if expected.smallest_margin > TIE_MARGIN:
            break
    assert expected.smallest_margin > TIE_MARGIN
    compare(workers.run("train_and_record", 4, overrides=settings, steps=2), expected)
