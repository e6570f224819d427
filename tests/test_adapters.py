"""The adapter maths against a literal loop over tokens and experts, written from the formulas in README.md.

float64, so that only a different formula can differ; tolerance 1e-10 of an entry.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from malora_dist.errors import ConfigError
from malora_dist.methods import budget, maths
from malora_dist.methods.spec import METHODS, AdapterSpec
from malora_dist.methods.start import initial_parameter

N_IN, M_OUT = 7, 5


def literal(spec: AdapterSpec, p: dict[str, Tensor], x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """One token at a time, one expert at a time."""
    rows, slots, prob_sums = [], [0.0] * spec.num_experts, [torch.zeros((), dtype=x.dtype)] * spec.num_experts
    for t in range(x.shape[0]):
        if not spec.is_mixture:
            rows.append(spec.scaling * (p["B"] @ (p["A"] @ x[t])))
            continue
        logits = [torch.dot(p["router"][e], x[t]) for e in range(spec.num_experts)]
        exps = [logit.exp() for logit in logits]
        g = [e / sum(exps) for e in exps]
        kept = sorted(range(spec.num_experts), key=lambda e: -float(g[e]))[: spec.topk]
        total = sum(g[e] for e in kept) if spec.norm_topk_prob and spec.topk > 1 else 1.0
        y = torch.zeros(M_OUT, dtype=x.dtype)
        for e in kept:
            hidden = p["A"][e] @ x[t] if spec.method == "molora" else p["P"][e] @ (p["S"] @ x[t])
            y = y + (g[e] / total).to(x.dtype) * (p["B"][e] @ hidden)
            slots[e] += float(valid[t])
        rows.append(spec.scaling * y)
        prob_sums = [s + g[e] * float(valid[t]) for e, s in enumerate(prob_sums)]
    if not spec.is_mixture:
        return torch.stack(rows), torch.zeros(())
    tokens = float(valid.sum())
    terms = [slots[e] / (tokens * spec.topk) * prob_sums[e] / tokens for e in range(spec.num_experts)]
    return torch.stack(rows), spec.aux_loss_coeff * spec.num_experts * sum(terms)


def parameters(spec: AdapterSpec, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {
        name: torch.randn(spec.parameter_shape(name, N_IN, M_OUT), dtype=torch.float64, requires_grad=True)
        for name in spec.parameter_names
    }


def specs() -> list[AdapterSpec]:
    common = {"lora_rank": 3, "shared_dim": 4, "lora_alpha": 5.0}
    plain = [AdapterSpec(method=m, **common) for m in ("lora", "asymmetric_lora")]
    mixtures = [
        AdapterSpec(method=m, num_lora_experts=n, topk=k, norm_topk_prob=norm, use_rslora=norm, **common)
        for m in ("molora", "malora") for n in (2, 5) for k in (1, 2) for norm in (True, False)
    ]  # fmt: skip
    return plain + mixtures


@pytest.mark.parametrize("spec", specs(), ids=lambda s: f"{s.method}-N{s.num_experts}-k{s.topk}-{s.norm_topk_prob}")
def test_forward_and_every_gradient(spec: AdapterSpec) -> None:
    valid = torch.tensor([True] * 9 + [False] * 2)
    results = []
    for function in (literal, maths.adapter_forward):
        p = parameters(spec)
        x = torch.randn(11, N_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
        y, aux = function(spec, p, x, valid)
        (y.cos().sum() + 3.0 * aux).backward()
        results.append([y, aux, x.grad, *(tensor.grad for tensor in p.values())])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12, check_dtype=False)


@pytest.mark.parametrize("method", ["molora", "malora"])
def test_an_expert_with_no_tokens_gets_zero_gradients(method: str) -> None:
    spec = AdapterSpec(method=method, num_lora_experts=3, topk=1, lora_rank=2, shared_dim=3)
    p = parameters(spec)
    x = torch.randn(6, N_IN, dtype=torch.float64).abs()
    with torch.no_grad():
        p["router"].copy_(torch.tensor([[1.0], [2.0], [-9.0]]).expand(3, N_IN))  # expert 2 never wins
    y, _ = maths.adapter_forward(spec, p, x)
    y.sum().backward()
    down = p["A" if method == "molora" else "P"].grad
    assert down is not None
    assert p["B"].grad is not None
    assert down[2].abs().sum() == 0
    assert p["B"].grad[2].abs().sum() == 0
    assert p["B"].grad[1].abs().sum() > 0


@pytest.mark.parametrize("method", ["molora", "malora"])
def test_no_rows_at_all_keeps_parameters_in_autograd(method: str) -> None:
    spec = AdapterSpec(method=method, num_lora_experts=2, lora_rank=2, shared_dim=3)
    p = parameters(spec)
    width = N_IN if method == "molora" else spec.shared_dim
    y = maths.expert_forward(spec, p, torch.zeros(0, width, dtype=torch.float64), torch.zeros(0, 2))
    y.sum().backward()
    for name in ("B", "A" if method == "molora" else "P"):
        assert torch.equal(p[name].grad, torch.zeros_like(p[name]))  # type: ignore[arg-type]


def test_all_load_on_one_expert_costs_most() -> None:
    spec = AdapterSpec(num_lora_experts=4, topk=1)
    even = maths.load_balancing_loss(spec, torch.full((4,), 3.0), torch.full((4,), 3.0))
    one = maths.load_balancing_loss(spec, 12.0 * torch.eye(4)[0], 12.0 * torch.eye(4)[0])
    assert float(even) == pytest.approx(0.01)
    assert float(one) == pytest.approx(0.04)


class TestStartValues:
    """B zero, S_A orthonormal, entries of P_t S_A with the variance of LoRA's A."""

    spec = AdapterSpec(num_lora_experts=8)

    def value(self, name: str, n: int = 512, seed: int = 1, experts: list[int] | None = None) -> Tensor:
        return initial_parameter(self.spec, name, n, 64, seed, 3, "q_proj", experts)

    def test_step_zero_is_the_base(self) -> None:
        assert self.value("B").abs().sum() == 0

    def test_shared_rows_are_orthonormal(self) -> None:
        s = self.value("S")
        torch.testing.assert_close(s @ s.T, torch.eye(self.spec.shared_dim), atol=1e-5, rtol=0)

    def test_variance_equals_loras(self) -> None:
        product = self.value("P") @ self.value("S")
        assert float(product.var()) == pytest.approx(1 / (3 * 512), rel=0.1)

    def test_experts_can_be_drawn_apart(self) -> None:
        torch.testing.assert_close(self.value("P", experts=[5, 2]), self.value("P")[[5, 2]], rtol=0, atol=0)

    def test_seed_layer_and_expert_all_matter(self) -> None:
        p = self.value("P")
        assert not torch.equal(p[0], p[1])
        assert not torch.equal(p, self.value("P", seed=2))
        assert not torch.equal(p, initial_parameter(self.spec, "P", 512, 64, 1, 4, "q_proj"))


class TestSpec:
    @pytest.mark.parametrize(
        ("fields", "named"),
        [
            ({"method": "loraa"}, "method='loraa'"),
            ({"target_modules": ["qkv"]}, "target_modules='qkv'"),
            ({"target_modules": []}, "target_modules=[]"),
            ({"topk": 9}, "topk=9: must not exceed num_lora_experts=8"),
            ({"lora_rank": 0}, "lora_rank=0"),
            ({"lora_dropout": 1.0}, "lora_dropout=1.0"),
            ({"rank_expansion": 0.01}, "rank_expansion=0.01"),
            ({"aux_loss_coeff": -1.0}, "aux_loss_coeff=-1.0"),
        ],
    )  # fmt: skip
    def test_a_wrong_field_is_named(self, fields: dict[str, object], named: str) -> None:
        with pytest.raises(ConfigError) as error:
            AdapterSpec(**fields).validate_adapter()  # type: ignore[arg-type]
        assert str(error.value).startswith(named)
        assert ";" in str(error.value)  # a cure follows the rule

    @pytest.mark.parametrize("method", METHODS)
    def test_defaults_are_valid(self, method: str) -> None:
        AdapterSpec(method=method).validate_adapter()

    def test_megatron_names_are_understood(self) -> None:
        assert AdapterSpec(target_modules=["linear_fc1", "q_proj"]).projections == ("q_proj", "gate_proj", "up_proj")

    def test_wasted_rank_is_warned_of(self) -> None:
        assert "shared_dim=4" in AdapterSpec(shared_dim=4).adapter_warnings()[0]
        assert AdapterSpec().adapter_warnings() == []


class TestBudget:
    """Known figures for one square layer 4096 wide, routers left out."""

    widths = {"q_proj": (4096, 4096)}  # noqa: RUF012

    def saving_without_routers(self, spec: AdapterSpec) -> float:
        own = budget.trainable_parameters(spec, self.widths)
        molora = AdapterSpec(**{**spec.adapter_fields(), "method": "molora"})
        other = budget.trainable_parameters(molora, self.widths)
        router = math.prod(spec.parameter_shape("router", 4096, 4096))
        return 1 - (sum(own.values()) - router) / (sum(other.values()) - router)

    def test_savings_over_molora(self) -> None:
        default = AdapterSpec(target_modules=["q_proj"])
        assert self.saving_without_routers(default) == pytest.approx(0.295, abs=5e-4)
        narrow = AdapterSpec(target_modules=["q_proj"], rank_expansion=1.0, shared_dim=8)
        assert self.saving_without_routers(narrow) == pytest.approx(0.437, abs=5e-4)

    @pytest.mark.parametrize("saving", [0.1, 0.2, 0.3])
    def test_solvers_reach_the_saving_and_not_more(self, saving: float) -> None:
        spec = AdapterSpec(target_modules=["q_proj"])
        d = budget.solve_shared_dim(spec, self.widths, saving)
        for extra, reached in ((0, True), (1, False)):
            found = AdapterSpec(target_modules=["q_proj"], shared_dim=d + extra)
            assert (budget.saving_over_molora(found, self.widths) >= saving) is reached
        beta = budget.solve_rank_expansion(spec, self.widths, saving)
        found = AdapterSpec(target_modules=["q_proj"], rank_expansion=beta)
        assert budget.saving_over_molora(found, self.widths) >= saving

    def test_an_unreachable_saving_says_so(self) -> None:
        with pytest.raises(ValueError, match="lower rank_expansion"):
            budget.solve_shared_dim(AdapterSpec(rank_expansion=4.0, target_modules=["q_proj"]), self.widths, 0.9)
