"""The learning rate of every step, and what a resumed run takes from its config."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from malora_dist.config_sections import TrainConfig
from malora_dist.training.optimizer import make_scheduler, set_hyperparameters


def optimizer_of_another_run() -> Any:
    """All that a schedule sees of an optimizer, as a checkpoint leaves it."""
    group = {"lr": 7.0, "max_lr": 7.0, "min_lr": 7.0, "betas": (0.5, 0.5), "eps": 7.0, "weight_decay": 7.0}
    return SimpleNamespace(param_groups=[group])


def rates(config: TrainConfig, after: int = 0) -> list[float]:
    """Of every step that follows."""
    optimizer = optimizer_of_another_run()
    scheduler = make_scheduler(config, optimizer)
    set_hyperparameters(config, optimizer, scheduler, after)
    found = []
    for _ in range(after, config.train_iters):
        found.append(optimizer.param_groups[0]["lr"])
        scheduler.step(increment=1)
    return found


@pytest.mark.parametrize("style", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_warm_up_rises_from_the_first_step_and_no_step_is_wasted(style: str, warmup: int) -> None:
    config = TrainConfig(lr=0.8, train_iters=10, lr_warmup_iters=warmup, lr_decay_style=style)
    found = rates(config)
    peak = max(warmup, 1)
    assert found[:peak] == pytest.approx([0.8 * step / peak for step in range(1, peak + 1)])
    assert min(found) > 0
    assert found[peak:] == sorted(found[peak:], reverse=True)
    if style == "linear":
        assert found[-1] == pytest.approx(0.8 / (11 - peak))  # one more step would have min_lr


@pytest.mark.parametrize("after", [1, 3, 4, 9])
def test_a_resumed_run_has_the_rates_of_an_uninterrupted_one(after: int) -> None:
    config = TrainConfig(lr=0.8, min_lr=0.1, train_iters=10, lr_warmup_iters=4)
    assert rates(config, after) == rates(config)[after:]


def test_the_config_decides_what_a_checkpoint_brings() -> None:
    config = TrainConfig(lr=0.8, lr_decay_style="constant", weight_decay=0.1, adam_beta2=0.98, adam_eps=1e-6)
    optimizer = optimizer_of_another_run()
    set_hyperparameters(config, optimizer, make_scheduler(config, optimizer), 5)
    (group,) = optimizer.param_groups
    expected = {"lr": 0.8, "max_lr": 0.8, "min_lr": 0.0, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1}
    assert group == expected
