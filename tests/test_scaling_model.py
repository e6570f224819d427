"""The model behind tools/benchmarks/scaling.py: its counts against those made elsewhere, its times at their limits."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from malora_dist.methods.budget import total
from malora_dist.methods.spec import MEGATRON_LINEARS, AdapterSpec
from malora_dist.planning.flops import adapter_macs

BENCHMARKS = Path(__file__).resolve().parents[1] / "tools" / "benchmarks"
NAMES = ("scaling_cluster", "scaling_parts", "scaling_model", "scaling_search", "scaling_measured", "scaling")
DISPATCHES = ("all_to_all", "gather_experts")


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, ModuleType]]:
    """{name: module}; the scripts import each other from their own folder."""
    sys.path.insert(0, str(BENCHMARKS))
    yield {name: importlib.import_module(name) for name in NAMES}
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def parts(modules: dict[str, ModuleType]) -> Any:
    return modules["scaling_parts"]


@pytest.fixture
def llama(modules: dict[str, ModuleType]) -> Any:
    return modules["scaling"].MODELS[0]


def layout(parts: Any, **sizes: int) -> Any:
    usual = {"gpus": 8, "tp": 1, "pp": 1, "ep": 8, "tokens": 65536, "micro_tokens": 4096, "seq_length": 4096}
    return parts.Layout(**(usual | sizes))


def only(modules: dict[str, ModuleType], **rates: float) -> Any:
    """A cluster on which nothing takes time but what these rates say."""
    cluster = modules["scaling_cluster"].Cluster()
    free = {
        field.name: math.inf if getattr(cluster, field.name) >= 1 else 0.0
        for field in dataclasses.fields(cluster)
        if field.name not in ("gpus_per_node", "memory", "reserved")
    }
    shares = {"gemm_efficiency": 1.0, "hbm_efficiency": 1.0, "link_efficiency": 1.0}
    return dataclasses.replace(cluster, **(free | shares | rates))


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("lora", "gated_block"),
        ("molora", "gated_block"),
        ("molora", "grouped"),
        ("malora", "gated_block"),
        ("malora", "grouped"),
        ("hydralora", "gated_block"),
    ],
)
def test_operations_are_those_of_the_floor(
    modules: dict[str, ModuleType], parts: Any, llama: Any, name: str, form: str, fuse: bool
) -> None:
    model = modules["scaling_model"]
    spec = AdapterSpec(method=name, num_lora_experts=16, fuse_projections=fuse)
    for linear in llama.linears:
        contender = parts.Contender("", spec, "local", float32_router=True)
        sites = parts.sites_of(contender, linear, layout(parts))
        passes = [model.input_ops(contender, linear, 1.0, 1)]
        passes += [model.expert_ops(site, 1.0, 1, form) for site in sites]
        counted = sum(op.flops for both in passes for ops in both for op in ops)
        macs = sum(adapter_macs(spec.declared, site.in_features, site.out_features, form) for site in sites)
        assert counted == pytest.approx(2 * macs)


@pytest.mark.parametrize("method", ["lora", "dora", "molora", "malora"])
@pytest.mark.parametrize("ep", [1, 8])
def test_trained_numbers_are_those_of_the_budget(parts: Any, llama: Any, method: str, ep: int) -> None:
    spec = AdapterSpec(method=method, num_lora_experts=16, target_modules=["q_proj", "v_proj", "linear_fc1", "o_proj"])
    widths = {
        name: (linear.in_features, width)
        for linear in llama.linears
        for name, width in zip(MEGATRON_LINEARS[linear.name], linear.widths, strict=True)
    }
    numbers = parts.trained_numbers(llama, parts.Contender("", spec, "all_to_all"), layout(parts, ep=ep))
    assert numbers.replicated + ep * numbers.experts == total(spec, widths, llama.layers)


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_dispatch_takes_the_bytes_of_the_cost_rule(
    modules: dict[str, ModuleType], parts: Any, llama: Any, dispatch: str
) -> None:
    spec, rate = AdapterSpec(), 1e9
    times = modules["scaling_model"].step_time(
        only(modules, nvlink=rate), llama, parts.Contender("", spec, dispatch), layout(parts)
    )
    sent = modules["scaling_search"].sent_bytes(llama, spec, dispatch, ep=8, tokens=8192)
    counts = 64 * 4 * llama.layers * 2  # the ranks tell each other how many rows come, once a linear and microbatch
    assert times.dispatch == pytest.approx((sent + (counts if dispatch == "all_to_all" else 0)) / rate)


def test_molora_brings_x_across_tensor_parallelism(modules: dict[str, ModuleType], parts: Any, llama: Any) -> None:
    rate, tp2, tokens, n_experts, rank = 1e9, layout(parts, tp=2, ep=4), 4096, 16, 8
    contender = parts.Contender("", AdapterSpec(method="molora", num_lora_experts=n_experts), "gather_experts")
    crossing, cluster = modules["scaling_model"].crossing_seconds, only(modules, nvlink=rate)
    fc1, fc2 = llama.linears[2:]
    logits = tokens * n_experts * 4 / 2  # gathered or reduce-scattered: half of it comes from the other rank
    gathered_x = tokens * llama.hidden * 2 / 2
    assert crossing(cluster, contender, fc1, tp2) == pytest.approx(2 * (logits + gathered_x) / rate)
    exchanged_x = tokens * llama.ffn / 2 * 2 / 2  # a rank has half the features and sends half the tokens
    down = n_experts * rank * llama.ffn * 4 / 2
    assert crossing(cluster, contender, fc2, tp2) == pytest.approx((logits + exchanged_x + down) / rate)


def test_collectives_across_nodes_share_the_ports(modules: dict[str, ModuleType]) -> None:
    group, cluster = modules["scaling_cluster"].Group, only(modules, nvlink=8e9, network=1e9)
    assert cluster.all_gather(group(8, 1), 8e9) == pytest.approx(7 / 8)
    assert cluster.all_gather(group(16, 1), 16e9) == pytest.approx(15 / 8)  # as fast as inside: eight ports
    assert cluster.all_gather(group(2, 8), 2e9) == pytest.approx(1.0)  # one port
    assert cluster.all_to_all(group(16, 1), 15e9) == pytest.approx(8.0)  # 8 of 15 parts leave the node
    assert cluster.all_reduce(group(1, 1), 1e9) == 0.0


def test_weights_and_pipeline(modules: dict[str, ModuleType], parts: Any, llama: Any) -> None:
    method = parts.Contender("", AdapterSpec(method="lora"), "local")
    cluster, model = modules["scaling_cluster"].Cluster(), modules["scaling_model"]
    whole = model.memory(cluster, llama, method, layout(parts, ep=1))
    assert whole.base == pytest.approx(2 * 8.03e9, rel=1e-3)
    compute = only(modules, bf16_flops=1e15)
    flat, staged = (model.step_time(compute, llama, method, layout(parts, ep=1, pp=pp)) for pp in (1, 4))
    assert flat.total == flat.base + flat.adapters
    assert staged.base == pytest.approx(flat.base)  # a fourth of the layers, four times the microbatches
    assert staged.pipeline / (staged.base + staged.adapters) == pytest.approx(3 / 8)  # PP - 1 of 8 microbatches


@pytest.mark.parametrize("first", [8, 16, 104, 248, 65536])
def test_crossover_is_found(modules: dict[str, ModuleType], first: int) -> None:
    assert modules["scaling_search"].first_multiple(lambda experts: experts >= first, ep=8) == first
    assert modules["scaling_search"].first_multiple(lambda experts: experts > 65536, ep=8) is None


def test_what_runs_fits_and_the_fastest_dispatch_is_close_to_auto(modules: dict[str, ModuleType], llama: Any) -> None:
    job, cluster = modules["scaling_search"].Job(4096, 1, 8, False), modules["scaling_cluster"].Cluster()
    runs = modules["scaling"].compare(cluster, llama, job, 8, 64, 64 * 8192)
    assert all(run.memory.total <= cluster.memory for run in runs.values())
    assert runs["malora auto"].times == runs["malora gather"].times
    assert runs["malora auto"].layout.ep == 8
    nothing = modules["scaling"].compare(dataclasses.replace(cluster, memory=1e9), llama, job, 8, 64, 64 * 8192)
    assert set(nothing.values()) == {None}


def test_only_rates_measured_on_a_gpu_are_taken_over(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    measured, cluster = modules["scaling_measured"], modules["scaling_cluster"].Cluster()
    assert measured.measured_parts(tmp_path, cluster) == []
    method = {"to_lora": {"median": 1.2}, "floor": 1.0, "flop_per_second": 0.4 * cluster.bf16_flops}
    figures = {"llama3-8b": dict.fromkeys(("lora", "molora", "malora"), method)}
    for device, rates in (("cpu", {}), ("cuda", {"gemm_efficiency": pytest.approx(0.4)})):
        content = {"device": device, "bf16": True, "figures": figures}
        (tmp_path / "step_time.json").write_text(json.dumps(content))
        assert measured.measured_rates(tmp_path, cluster) == rates
    assert [part.value for part in measured.measured_parts(tmp_path, cluster)] == [1.2, 1.2]


def test_a_figure_without_matplotlib(
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--png", "x.png"])
    monkeypatch.setattr(modules["scaling"].importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        modules["scaling"].main()
    assert stop.value.code == 2
    assert "--png needs the package matplotlib" in capsys.readouterr().err
