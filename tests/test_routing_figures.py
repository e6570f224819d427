"""Figures of expert balance and of what routing knows of the tasks, against numbers made by hand."""

from __future__ import annotations

import math

import pytest
import torch

from malora_dist.config import Config
from malora_dist.layers.routing_context import SiteStatistics
from malora_dist.methods.routing import effective_share, max_over_mean, mutual_information, variation
from malora_dist.metrics.routing import RoutingReport

EVEN, ALL_ON_ONE, NONE = [5.0] * 4, [0.0, 20.0, 0.0, 0.0], [0.0] * 4


@pytest.mark.parametrize(
    ("load", "largest", "spread", "effective"),
    [
        (EVEN, 1.0, 0.0, 1.0),
        (ALL_ON_ONE, 4.0, math.sqrt(3), 0.25),
        (NONE, 1.0, 0.0, 1.0),
        ([3.0, 1.0, 0.0, 0.0], 3.0, math.sqrt(6) / 2, math.exp(math.log(4) - 0.75 * math.log(3)) / 4),
    ],
)
def test_balance(load: list[float], largest: float, spread: float, effective: float) -> None:
    load_N = torch.tensor(load, dtype=torch.float64)
    assert max_over_mean(load_N) == pytest.approx(largest)
    assert variation(load_N) == pytest.approx(spread)
    assert effective_share(load_N) == pytest.approx(effective)


@pytest.mark.parametrize(
    ("counts", "bits"),
    [
        ([EVEN, EVEN], 0.0),
        ([ALL_ON_ONE, ALL_ON_ONE], 0.0),
        ([[8.0, 0.0, 0.0, 0.0], [0.0, 8.0, 0.0, 0.0]], 1.0),  # each task has an expert to itself
        ([[8.0, 8.0, 0.0, 0.0], [0.0, 0.0, 8.0, 8.0]], 1.0),
        ([[1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0]], 0.5),
        ([[9.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 3.0]], 1.0),  # tasks count alike, however many tokens they have
        ([ALL_ON_ONE, EVEN], 0.5 * (math.log2(1 / 0.625) + 0.25 * math.log2(0.25 / 0.625) + 0.75 * 1.0)),
        ([NONE, NONE], 0.0),
    ],
)
def test_mutual_information(counts: list[list[float]], bits: float) -> None:
    assert mutual_information(torch.tensor(counts, dtype=torch.float64)) == pytest.approx(bits, abs=1e-12)


def statistics(counts: list[list[float]]) -> SiteStatistics:
    """Of one site in two microbatches; ten slots on padding, which count for nothing."""
    padding = [10.0, 0.0, 0.0, 0.0]
    numbers = [torch.tensor(number) for number in (6.0, 0.5, 2.0)]
    return SiteStatistics(torch.tensor([padding, *counts]), *numbers)


def test_report() -> None:
    """Two layers of one projection, the later one first as in an interleaved pipeline; top-2 of 4 experts."""
    separated = [[6.0, 6.0, 0.0, 0.0], [0.0, 0.0, 6.0, 6.0]]
    sites = {"layers.1.q_proj": statistics([ALL_ON_ONE, NONE]), "layers.0.q_proj": statistics(separated)}
    report = RoutingReport(sites, Config(num_lora_experts=4, topk=2, aux_loss_coeff=0.01), ["a", "b"])
    found = report.metrics(tables=True)
    expected = {
        "malora/balance/median": 2.5,
        "malora/balance/p90": 3.7,
        "malora/balance/max": 4.0,
        "malora/load variation": math.sqrt(3) / 2,
        "malora/effective experts": 0.625,
        "malora/dead experts": 3 / 8,
        "malora/router entropy": (6.0 / 12 + 6.0 / 10) / 2,
        "malora/aux loss": 0.5,  # a mean over two microbatches for each of two sites
        "malora/ideal aux loss": 0.02,
        "malora/task information": 0.5,
        "malora/task information of the best site": 1.0,
    }
    assert found.scalars == {tag: pytest.approx(value) for tag, value in expected.items()}
    load, tasks, bits = (
        found.tables[f"malora/{name}"] for name in ("load/q_proj", "load of tasks/q_proj", "task information")
    )
    assert load == (["0", "1"], ["0", "1", "2", "3"], [[1.0] * 4, [0.0, 4.0, 0.0, 0.0]])
    assert tasks.rows == ["a", "b"]
    assert tasks.columns == ["0.0", "0.1", "0.2", "0.3", "1.0", "1.1", "1.2", "1.3"]
    assert tasks.values == [[2.0, 2.0, 0.0, 0.0, 0.0, 4.0, 0.0, 0.0], [0.0, 0.0, 2.0, 2.0, 0.0, 0.0, 0.0, 0.0]]
    assert bits == (["q_proj"], ["0", "1"], [[pytest.approx(1.0), 0.0]])


def test_sites_and_nothing() -> None:
    config = Config(num_lora_experts=4, topk=2)
    of_sites = RoutingReport({"layers.0.up_proj": statistics([EVEN, EVEN])}, config, ["a", "b"]).metrics(of_sites=True)
    assert of_sites.scalars["malora/balance/layers.0.up_proj"] == 1.0
    assert of_sites.counts["malora/tokens per expert/layers.0.up_proj"] == [10.0] * 4
    assert of_sites.counts["malora/tokens per task and expert/layers.0.up_proj/b"] == EVEN
    assert of_sites.tables == {}
    empty = RoutingReport({}, config, ["a", "b"]).metrics(of_sites=True, tables=True)  # a method without a router
    assert (empty.scalars, empty.counts, empty.tables) == ({}, {}, {})
