"""Parameter counts against the figures of the paper (arXiv 2410.22782), its rank rule, and widths for a budget.

The model is LLaMA-2 7B with adapters on q, k, v, gate, up and down. The paper does not list o, and its counts agree
only without it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from malora_dist.errors import ConfigError
from malora_dist.families.base import projection_widths
from malora_dist.families.shapes import base_parameters, released_config
from malora_dist.methods.budget import (
    Ranks,
    adapter_parameters,
    largest,
    rank_rule,
    total,
    trainable_parameters,
    trained_share,
)
from malora_dist.methods.spec import AdapterSpec

TARGETS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
LLAMA2 = released_config("llama2-7b")
LAYERS = 32
WIDTHS = {
    "q_proj": (4096, 4096), "k_proj": (4096, 4096), "v_proj": (4096, 4096), "o_proj": (4096, 4096),
    "gate_proj": (4096, 11008), "up_proj": (4096, 11008), "down_proj": (11008, 4096),
}  # fmt: skip


def spec(method: str, lora_rank: int, **fields: Any) -> AdapterSpec:
    return AdapterSpec(method=method, lora_rank=lora_rank, target_modules=TARGETS, **fields)


def count(adapter: AdapterSpec, with_router: bool = True) -> int:
    return total(adapter, WIDTHS, LAYERS, with_router)


MALORA = spec("malora", 12, shared_dim=32)
SMALL = spec("malora", 8, shared_dim=22)


def test_the_base_has_6738_million_parameters() -> None:
    assert base_parameters(LLAMA2) == 6_738_415_616
    assert base_parameters(released_config("llama3-8b")) == 8_030_261_248
    assert projection_widths(LLAMA2) == WIDTHS


@pytest.mark.parametrize(
    ("adapter", "millions", "percent"),
    [
        (spec("lora", 64), 143.1, 2.1),
        (spec("dora", 64), 144.4, 2.1),
        (spec("asymmetric_lora", 128), 157.3, 2.2),
        (spec("molora", 8), 151.2, 2.2),
        (MALORA, 158.9, 2.3),
        (SMALL, 109.1, 1.6),
    ],
    ids=lambda value: value.method if isinstance(value, AdapterSpec) else None,
)
def test_sizes_of_the_papers_table_1(adapter: AdapterSpec, millions: float, percent: float) -> None:
    assert round(count(adapter) / 1e6, 1) == millions
    assert round(100 * trained_share(adapter, WIDTHS, LAYERS, base_parameters(LLAMA2)), 1) == percent


def test_the_papers_30_percent() -> None:
    """MALoRA-Small against MoLoRA of the same rank, routers left out."""
    assert 1 - count(SMALL, with_router=False) / count(spec("molora", 8), with_router=False) == pytest.approx(
        0.294, abs=5e-4
    )


def test_the_papers_48_percent() -> None:
    """MALoRA of rank 12 against MoLoRA of rank 16, routers left out."""
    assert 1 - count(MALORA, with_router=False) / count(spec("molora", 16), with_router=False) == pytest.approx(
        0.473, abs=5e-4
    )


def test_kinds_add_up() -> None:
    """MALoRA by the shapes: of 6 projections a layer, their inputs are 5 * 4096 + 11008 wide, their outputs 38400."""
    inputs, outputs = 5 * 4096 + 11008, 4 * 4096 + 2 * 11008
    assert trainable_parameters(MALORA, WIDTHS, LAYERS) == {
        "router": LAYERS * 8 * inputs,
        "S": LAYERS * 32 * inputs,
        "P": LAYERS * 6 * 8 * 12 * 32,
        "B": LAYERS * 8 * 12 * outputs,
    }


def test_what_is_frozen_is_not_trainable() -> None:
    asymmetric = spec("asymmetric_lora", 128)
    assert list(trainable_parameters(asymmetric, WIDTHS)) == ["B"]
    assert list(adapter_parameters(asymmetric, WIDTHS)) == ["A", "B"]
    frozen = spec("malora", 16, shared_dim=32, freeze=["S"])
    assert "S" not in trainable_parameters(frozen, WIDTHS)


def test_fused_projections_share_all_but_b() -> None:
    """q, k, v have one S instead of three, gate and up one instead of two; B stays with its projection."""
    apart, fused = (trainable_parameters(replace(MALORA, fuse_projections=on), WIDTHS, LAYERS) for on in (False, True))
    assert apart["S"] - fused["S"] == LAYERS * 3 * 32 * 4096
    assert apart["B"] == fused["B"]


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.25, Ranks(16, 14)), (0.5, Ranks(32, 12)), (0.75, Ranks(48, 10)), (1.0, Ranks(64, 8))],
)
def test_the_papers_rank_rule(share: float, expected: Ranks) -> None:
    assert rank_rule(8, 8, share) == expected


@pytest.mark.parametrize("share", [0.0, -0.5, 1.01])
def test_the_rank_rule_refuses_other_shares(share: float) -> None:
    with pytest.raises(ValueError, match="must lie in"):
        rank_rule(8, 8, share)


@pytest.mark.parametrize("method", ["lora", "asymmetric_lora", "dora", "molora", "hydralora", "malora", "malora_b"])
@pytest.mark.parametrize("budget", [60_000_000, 151_191_552])
def test_the_largest_rank_fits_and_one_more_does_not(method: str, budget: int) -> None:
    found = largest(spec(method, 8), "lora_rank", WIDTHS, budget, LAYERS)
    assert found.lora_rank is not None
    assert count(found) <= budget
    assert count(spec(method, found.lora_rank + 1)) > budget


def test_the_largest_shared_dim_fits_and_one_more_does_not() -> None:
    found = largest(SMALL, "shared_dim", WIDTHS, 130_000_000, LAYERS)
    assert found.lora_rank == 8
    assert count(found) <= 130_000_000 < count(replace(found, shared_dim=found.shared_dim + 1))


def test_a_budget_just_met_gives_the_same_rank_back() -> None:
    molora = spec("molora", 8)
    assert largest(molora, "lora_rank", WIDTHS, count(molora), LAYERS).lora_rank == 8
    assert largest(molora, "lora_rank", WIDTHS, count(molora) - 1, LAYERS).lora_rank == 7


@pytest.mark.parametrize("use_rslora", [False, True])
def test_another_rank_keeps_the_scaling(use_rslora: bool) -> None:
    start = spec("lora", 8, lora_alpha=24.0, use_rslora=use_rslora)
    found = largest(start, "lora_rank", WIDTHS, 143_130_624, LAYERS)
    assert found.lora_rank == 64
    assert found.declared.scaling == pytest.approx(start.declared.scaling)


def test_a_budget_below_rank_1_says_so() -> None:
    with pytest.raises(ConfigError, match="lora_rank=1: is too much for method=malora within 1,000 parameters; raise"):
        largest(MALORA, "lora_rank", WIDTHS, 1000, LAYERS)


def test_a_width_that_the_method_does_not_have_says_so() -> None:
    with pytest.raises(ConfigError, match="shared_dim=1: does not change the size of method=lora; solve lora_rank"):
        largest(spec("lora", 8), "shared_dim", WIDTHS, 10**9, LAYERS)
