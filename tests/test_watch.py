"""What the watch warns of, when, and that it is silent about what is well."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from malora_dist.config import Config
from malora_dist.layers.routing_context import SiteStatistics
from malora_dist.metrics import watch as rules
from malora_dist.metrics.loggers.base import Metrics
from malora_dist.metrics.routing import RoutingReport
from malora_dist.metrics.watch import Watch
from tests.test_parity import overrides
from tests.workers import WorkerPool

CONFIG = Config(num_lora_experts=4, topk=1, aux_loss_coeff=0.01, lr=1e-3)
EVEN = [100.0] * 4


def report(*loads: list[float]) -> RoutingReport:
    """Of one projection in as many layers."""
    zeros = torch.zeros(())
    sites = {
        f"layers.{i}.q_proj": SiteStatistics(torch.tensor([[0.0] * 4, load]), zeros, zeros, zeros)
        for i, load in enumerate(loads)
    }
    return RoutingReport(sites, CONFIG, ["task"])


def warnings_of(watch: Watch, routing: RoutingReport, reports: int, metrics: Metrics | None = None) -> dict[int, str]:
    """{number of the report, from 1: its warnings} of equal reports."""
    texts = {i: watch.report(routing, metrics or Metrics()) for i in range(1, reports + 1)}
    return {i: "\n".join(found) for i, found in texts.items() if found}


def test_even_experts_are_well() -> None:
    assert warnings_of(Watch(CONFIG, [0]), report(EVEN, [70.0, 90.0, 110.0, 130.0]), 30) == {}
    assert warnings_of(Watch(CONFIG, [0]), report([19.0 * 4, 0.0, 0.0, 0.0]), 30) == {}, "too few tokens to say"
    assert warnings_of(Watch(CONFIG, [0]), report(), 30) == {}, "a method without a router"


def test_a_starved_expert() -> None:
    found = warnings_of(Watch(CONFIG, [0]), report(EVEN, [130.0, 130.0, 136.0, 4.0]), 30)
    assert found == {
        rules.STARVED_REPORTS: "1 of 8 experts have had less than 5% of an even load in 10 reports in a row and hardly "
        "train (expert 3 of layers.1.q_proj); raise aux_loss_coeff=0.01, or lower num_lora_experts=4"
    }
    watch, starving = Watch(CONFIG, [0]), report([130.0, 130.0, 136.0, 4.0])
    assert warnings_of(watch, starving, rules.STARVED_REPORTS - 1) == {}
    assert warnings_of(watch, report(EVEN), 1) == {}
    assert warnings_of(watch, starving, rules.STARVED_REPORTS - 1) == {}, "it had its share in between"
    assert warnings_of(watch, starving, 1) != {}
    assert warnings_of(watch, report(EVEN), 1) == {}
    assert list(warnings_of(watch, starving, 30)) == [rules.STARVED_REPORTS], "once more, as it had passed"


def test_an_expert_that_takes_most() -> None:
    found = warnings_of(Watch(CONFIG, [0]), report(EVEN, [8.0, 376.0, 8.0, 8.0]), rules.ROUTING_REPORTS + 3)
    assert found == {
        rules.ROUTING_REPORTS: "expert 1 of layers.1.q_proj takes 94% of the tokens; raise aux_loss_coeff=0.01"
    }


def test_a_collapsed_router() -> None:
    found = warnings_of(Watch(CONFIG, [0]), report(EVEN, *[[0.0, 0.0, 400.0, 0.0]] * 2), rules.ROUTING_REPORTS + 3)
    assert found == {
        rules.ROUTING_REPORTS: "the router has collapsed: at 2 of 3 adapted projections nearly all tokens go to the "
        "same 1 of 4 experts; raise aux_loss_coeff=0.01, or lower lr=0.001 and begin again"
    }


def test_waiting_for_data() -> None:
    for share, expected in ((0.19, []), (0.25, [rules.DATA_REPORTS])):
        found = warnings_of(
            Watch(CONFIG, [0]), report(), 9, Metrics({"time share/data": share / 2, "time share/evaluation": 0.5})
        )
        assert list(found) == expected
        assert all(text.startswith("25% of a step is spent waiting for its batch; ") for text in found.values())


@pytest.mark.parametrize(
    ("stages", "seconds", "slow"),
    [
        ([0, 0], [1.0, 1.2], None),
        ([0, 0], [1.0, 1.4], 1),
        ([0, 0, 0, 0], [1.0, 2.0, 1.1, 0.9], 1),
        ([0, 0, 1, 1], [1.0, 1.0, 3.0, 3.0], None),  # another stage has other work
        ([0, 1], [1.0, 3.0], None),
        ([0, 0, 1, 1], [1.0, 1.0, 3.0, 6.0], 3),
    ],
)
def test_a_straggling_rank(stages: list[int], seconds: list[float], slow: int | None) -> None:
    found = warnings_of(
        Watch(CONFIG, stages),
        report(),
        9,
        Metrics(counts={rules.COMPUTE_TAG: seconds, rules.POSITIONS_TAG: [9.0] * len(seconds)}),
    )
    assert list(found) == ([] if slow is None else [rules.STRAGGLER_REPORTS])
    assert all(text.startswith(f"rank {slow} computes ") for text in found.values())


def test_longer_samples_make_no_straggler() -> None:
    counts = {rules.COMPUTE_TAG: [1.0, 3.0, 1.0], rules.POSITIONS_TAG: [100.0, 300.0, 90.0]}
    assert warnings_of(Watch(CONFIG, [0, 0, 0]), report(), 9, Metrics(counts=counts)) == {}


def validate(watch: Watch, training: dict[str, float], losses: dict[str, float], step: int) -> list[str]:
    watch.report(report(), Metrics({f"lm loss/{task}": loss for task, loss in training.items()}))
    return watch.evaluation({f"lm loss validation/{task}": loss for task, loss in losses.items()}, step)


def test_a_task_learnt_by_heart() -> None:
    watch = Watch(CONFIG, [0])
    assert validate(watch, {"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 1.0}, 10) == []
    assert validate(watch, {"a": 0.5, "b": 0.9}, {"a": 1.2, "b": 0.9}, 20) == []
    assert validate(watch, {"a": 0.3, "b": 0.8}, {"a": 1.3, "b": 0.8}, 30) == [
        "validation loss of a has risen from 1 at iteration 10 to 1.3 while its training loss falls: it is learnt by "
        "heart; end sooner (early_stopping_patience), lower lr=0.001, or lower its weight"
    ]
    assert validate(watch, {"a": 0.2, "b": 0.8}, {"a": 1.4, "b": 0.7}, 40) == [], "told once"


def test_no_seesaw_without_a_winner_and_no_warning_of_trifles() -> None:
    watch = Watch(CONFIG, [0])
    for step, loss in ((10, 1.0), (20, 1.1), (30, 1.2)):
        found = validate(watch, {"a": loss}, {"a": loss, "b": 1e-4 * step}, step)
    assert found == [
        "validation loss of a has risen from 1 at iteration 10 to 1.2, and no task gained: training diverges; lower "
        "lr=0.001"
    ]


def test_a_seesaw() -> None:
    watch = Watch(CONFIG, [0])
    for step, a, b in ((10, 1.0, 1.0), (20, 1.1, 0.9)):
        assert validate(watch, {"a": a, "b": b}, {"a": a, "b": b}, step) == []
    assert validate(watch, {"a": 1.2, "b": 0.8}, {"a": 1.2, "b": 0.8}, 30) == [
        "validation loss of a has risen from 1 at iteration 10 to 1.2 while b gained, a seesaw: tasks compete; raise "
        "its weight, lower lr=0.001, or give them room (num_lora_experts, lora_rank)"
    ]


def test_a_run_warns_of_its_routers(
    workers: WorkerPool, base_dir: Path, task_files: list[Path], tmp_path: Path
) -> None:
    """On the console and in the file, at the fifth report."""
    settings = overrides(
        base_dir, task_files, "expert_model_parallel_size=2", "train_iters=6", "log_interval=1", "eval_iters=0",
        "lr=1e-30", "aux_loss_coeff=0.01", f"save={tmp_path}", "save_interval=0",
    )  # fmt: skip
    said = "".join(workers.run("jobs_watch:train_with_blind_routers", 2, overrides=settings))
    assert re.findall("warning at iteration (\\d+): (.*?):", said) == [("5", "the router has collapsed")]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "warning"] == [5]
