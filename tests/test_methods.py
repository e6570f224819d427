"""Every method's declaration and one-process maths against a literal loop written from the papers' formulas.

float64, so that only a different formula can differ; tolerance 1e-10 of an entry.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from malora_dist.errors import ConfigError
from malora_dist.methods.base import METHODS, Method, Param
from malora_dist.methods.initial import initial_parameter
from malora_dist.methods.reference import adapted_forward, sum_over_experts
from malora_dist.methods.routing import load_balancing_loss
from malora_dist.methods.spec import AdapterSpec

N_IN, N_OUT = 7, 5
ROUTED = [name for name, method in METHODS.items() if method.is_mixture()]
SINGLE = [name for name in METHODS if name not in ROUTED]


def product_of_expert(method: str, p: dict[str, Tensor], e: int) -> Tensor:
    """dW of one expert without its gate and s, [m, n], from the formulas of docs/methods.md."""
    formulas = {
        "molora": lambda: p["B"][e] @ p["A"][e],
        "mo_asymmetric_lora": lambda: p["B"][e] @ p["A"][e],
        "molora_equal_start": lambda: p["B"][e] @ p["A"][e],
        "hydralora": lambda: p["B"][e] @ p["A"],
        "malora": lambda: p["B"][e] @ p["P"][e] @ p["S"],
        "malora_unshared": lambda: p["B"][e] @ p["P"][e] @ p["S"][e],
        "malora_b": lambda: p["S"] @ p["P"][e] @ p["A"][e],
    }
    return formulas[method]()


def literal(spec: AdapterSpec, p: dict[str, Tensor], x: Tensor, weight: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """One token at a time, one expert at a time: (output, load-balancing loss)."""
    s = spec.lora_alpha / (spec.lora_rank**0.5 if spec.use_rslora else spec.lora_rank)
    if not spec.is_mixture:
        whole = weight + s * p["B"] @ p["A"]
        if spec.method == "dora":
            whole = p["magnitude"].unsqueeze(1) * whole / whole.norm(dim=1, keepdim=True).detach()
        return torch.stack([whole @ token for token in x]), torch.zeros(())
    rows, slots, prob_sums = [], [0.0] * spec.num_experts, [torch.zeros((), dtype=x.dtype)] * spec.num_experts
    for t in range(x.shape[0]):
        logits = [torch.dot(p["router"][e], x[t]) for e in range(spec.num_experts)]
        exps = [logit.exp() for logit in logits]
        g = [e / sum(exps) for e in exps]
        kept = sorted(range(spec.num_experts), key=lambda e: -float(g[e].detach()))[: spec.topk]
        total = sum(g[e] for e in kept) if spec.norm_topk_prob and spec.topk > 1 else 1.0
        y = weight @ x[t]
        for e in kept:
            y = y + s * (g[e] / total) * (product_of_expert(spec.method, p, e) @ x[t])
            slots[e] += float(valid[t])
        rows.append(y)
        prob_sums = [q + g[e] * float(valid[t]) for e, q in enumerate(prob_sums)]
    tokens = float(valid.sum())
    terms = [slots[e] / (tokens * spec.topk) * prob_sums[e] / tokens for e in range(spec.num_experts)]
    return torch.stack(rows), spec.aux_loss_coeff * spec.num_experts * sum(terms)


def parameters(spec: AdapterSpec, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    method = spec.declared
    return {
        name: torch.randn(method.shape(name, N_IN, N_OUT), dtype=torch.float64, requires_grad=True)
        for name in method.parameters
    }


def specs() -> list[AdapterSpec]:
    plain = [AdapterSpec(method=m, lora_rank=3, lora_alpha=5.0, use_rslora=rs) for m in SINGLE for rs in (False, True)]
    mixtures = [
        AdapterSpec(
            method=m, num_lora_experts=n, topk=k, norm_topk_prob=norm, use_rslora=norm, lora_rank=3, lora_alpha=5.0,
            shared_dim=2 * n if m == "malora_unshared" else 4,
        )
        for m in ROUTED for n in (2, 5) for k in (1, 2) for norm in (True, False)
    ]  # fmt: skip
    return plain + mixtures


@pytest.mark.parametrize("spec", specs(), ids=lambda s: f"{s.method}-N{s.num_experts}-k{s.topk}-{s.norm_topk_prob}")
def test_forward_and_every_gradient(spec: AdapterSpec) -> None:
    valid = torch.tensor([True] * 9 + [False] * 2)
    results = []
    for function in (literal, lambda spec, *rest: adapted_forward(spec.declared, *rest)):
        p = parameters(spec)
        g = torch.Generator().manual_seed(1)
        x = torch.randn(11, N_IN, dtype=torch.float64, generator=g, requires_grad=True)
        weight = torch.randn(N_OUT, N_IN, dtype=torch.float64, generator=g)
        y, aux = function(spec, p, x, weight, valid)
        (y.cos().sum() + 3.0 * aux).backward()
        results.append([y, aux, x.grad, *(tensor.grad for tensor in p.values())])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12, check_dtype=False)


@pytest.mark.parametrize("method", ROUTED)
def test_the_chain_of_the_kernels_is_the_method(method: str) -> None:
    """up (down (project x)) is what project and expert compute."""
    spec = AdapterSpec(method=method, num_lora_experts=2, lora_rank=3, shared_dim=4)
    declared, chain = spec.declared, spec.declared.chain
    if chain is None:
        pytest.skip("computed by its own functions")
    p = parameters(spec)
    x = torch.randn(6, N_IN, dtype=torch.float64)
    z = x if chain.project is None else x @ p[chain.project].T
    torch.testing.assert_close(declared.project(p, x), z)
    for e in range(2):
        inner = z if chain.down is None else z @ p[chain.down][e].T
        own = {name: p[name][e] if param.is_expert else p[name] for name, param in declared.parameters.items()}
        torch.testing.assert_close(declared.expert(own, z), inner @ p[chain.up][e].T)


@pytest.mark.parametrize("method", list(METHODS))
def test_declared_widths_are_those_of_the_functions(method: str) -> None:
    """What is sent and returned is as wide as the declaration says; every format of the exchange relies on it."""
    spec = AdapterSpec(method=method, num_lora_experts=2, lora_rank=3, shared_dim=4)
    declared = spec.declared
    p, widths = parameters(spec), declared.widths(N_IN, N_OUT)
    z = declared.project(p, torch.randn(6, N_IN, dtype=torch.float64))
    own = {name: p[name][0] if param.is_expert else p[name] for name, param in declared.parameters.items()}
    v = declared.expert(own, z)
    assert z.shape[1] == widths[declared.sent]
    assert v.shape[1] == widths[declared.returned]
    assert declared.combine(p, v).shape[1] == N_OUT


@pytest.mark.parametrize("method", list(METHODS))
def test_project_is_linear_in_x_and_uses_shared_input_parameters_only(method: str) -> None:
    """Beside a row-parallel linear every rank projects its share of the input, and the results are summed."""
    declared = AdapterSpec(method=method, num_lora_experts=2, lora_rank=3, shared_dim=4).declared
    whole = parameters(declared.settings)  # type: ignore[arg-type]
    p = declared.before_dispatch(whole, torch.float64)
    x, other = (torch.randn(6, N_IN, dtype=torch.float64) for _ in range(2))
    sum_of_both = declared.project(p, x) + declared.project(p, other)
    torch.testing.assert_close(declared.project(p, x + other), sum_of_both)


@pytest.mark.parametrize("method", ROUTED)
def test_an_expert_with_no_tokens_gets_zero_gradients(method: str) -> None:
    spec = AdapterSpec(method=method, num_lora_experts=3, topk=1, lora_rank=2, shared_dim=3)
    p = parameters(spec)
    x = torch.randn(6, N_IN, dtype=torch.float64).abs()
    with torch.no_grad():
        p["router"].copy_(torch.tensor([[1.0], [2.0], [-9.0]]).expand(3, N_IN))  # expert 2 never wins
    adapted_forward(spec.declared, p, x, torch.zeros(N_OUT, N_IN, dtype=torch.float64))[0].sum().backward()
    for name, param in spec.declared.parameters.items():
        if param.is_expert:
            grad = p[name].grad
            assert grad is not None
            assert not grad[2].any()
            assert grad[1].any()


@pytest.mark.parametrize("method", ROUTED)
def test_no_rows_at_all_keeps_parameters_in_autograd(method: str) -> None:
    spec = AdapterSpec(method=method, num_lora_experts=2, lora_rank=2, shared_dim=4)
    declared, p = spec.declared, parameters(spec)
    z = torch.zeros(0, declared.widths(N_IN, N_OUT)[declared.sent], dtype=torch.float64)
    sum_over_experts(declared, p, z, torch.zeros(0, 2)).sum().backward()
    for name, param in declared.parameters.items():
        if param.is_expert:
            assert torch.equal(p[name].grad, torch.zeros_like(p[name]))  # type: ignore[arg-type]


def test_all_load_on_one_expert_costs_most() -> None:
    method = AdapterSpec(num_lora_experts=4, topk=1).declared
    even = load_balancing_loss(method, torch.full((4,), 3.0), torch.full((4,), 3.0))
    one = load_balancing_loss(method, 12.0 * torch.eye(4)[0], 12.0 * torch.eye(4)[0])
    assert float(even) == pytest.approx(0.01)
    assert float(one) == pytest.approx(0.04)


class TestPlacement:
    """The table of docs/architecture.md, written out: (tp axis, expert axis, the three marks)."""

    YES, NO = True, False
    TABLE = {  # noqa: RUF012
        # axes                          style     tp    expert  sequence_parallel, allreduce, tensor_model_parallel
        ("column", ("shared", "in")): (None, None, YES, YES, NO),
        ("column", ("logit", "in")): (None, None, YES, YES, NO),
        ("column", ("rank", "in")): (None, None, YES, YES, NO),
        ("column", ("expert", "rank", "shared")): (None, 0, YES, NO, NO),
        ("column", ("expert", "rank", "in")): (None, 0, YES, NO, NO),
        ("column", ("expert", "out", "rank")): (1, 0, NO, NO, YES),
        ("column", ("out", "rank")): (0, None, NO, YES, YES),
        ("column", ("out",)): (0, None, NO, YES, YES),
        ("row", ("shared", "in")): (1, None, NO, YES, YES),
        ("row", ("logit", "in")): (1, None, NO, YES, YES),
        ("row", ("rank", "in")): (1, None, NO, YES, YES),
        ("row", ("expert", "rank", "shared")): (None, 0, YES, NO, NO),
        ("row", ("expert", "rank", "in")): (2, 0, NO, NO, YES),
        ("row", ("expert", "out", "rank")): (None, 0, YES, NO, NO),
        ("row", ("out", "rank")): (None, None, YES, YES, NO),
        ("row", ("out",)): (None, None, YES, YES, NO),
    }

    @pytest.mark.parametrize(("style", "axes"), TABLE)
    def test_marks_follow_from_the_axes(self, style: str, axes: tuple[str, ...]) -> None:
        where = Param(*axes).placement(style)  # type: ignore[arg-type]
        assert (*where, *where.marks.values()) == self.TABLE[style, axes]

    def test_every_parameter_of_the_seven_methods_is_in_the_table(self) -> None:
        ablations = ("malora_b", "malora_unshared")
        for name, method in METHODS.items():
            for param in method.parameters.values():
                assert name in ablations or ("row", param.axes) in self.TABLE


class TestStartValues:
    """Equations 8 to 10: S_A = beta V_0, P_t the first rows of U_t Sigma_t over beta, B zero."""

    N = 512

    def value(self, name: str, seed: int = 1, experts: list[int] | None = None, **fields: float) -> Tensor:
        method = AdapterSpec(**fields).declared  # type: ignore[arg-type]
        return initial_parameter(method, name, self.N, 64, seed, 3, "q_proj", experts)

    def test_step_zero_is_the_base(self) -> None:
        for name in METHODS:
            spec = AdapterSpec(method=name)
            zeros = [
                p for p in spec.declared.parameters if not initial_parameter(spec.declared, p, 64, 64, 1, 0, "x").any()
            ]
            assert zeros == (["P"] if name == "malora_b" else ["B"])

    @pytest.mark.parametrize("beta", [0.3, 1.0, 3.5])
    def test_rows_of_the_shared_basis_are_orthogonal_with_norm_beta(self, beta: float) -> None:
        s = self.value("S", beta=beta)
        torch.testing.assert_close(s @ s.T, beta**2 * torch.eye(32), atol=1e-5 * beta**2, rtol=0)

    @pytest.mark.parametrize("beta", [0.3, 1.0, 3.5])
    @pytest.mark.parametrize("rank", [12, 40])
    def test_p_s_has_the_variance_of_loras_a_whatever_beta(self, rank: int, beta: float) -> None:
        """1 / (3 n). 8 experts x 12 rows x 512 columns: the estimate's own spread is below 1%; P_t S_A has rows of
        length sqrt(1/3) +- 2%. Rank 40 exceeds d = 32, which is allowed and warned of."""
        product = self.value("P", beta=beta, lora_rank=rank) @ self.value("S", beta=beta)
        assert float(product.var()) == pytest.approx(1 / (3 * self.N), rel=0.03)
        assert float(product.mean()) == pytest.approx(0.0, abs=1e-3)

    def test_it_is_the_svd_of_the_equations(self) -> None:
        """P_t S_A V_0^T has the Gram matrix of K_t's first rows, and beta cancels; columns fall by singular value."""
        p = self.value("P").double()
        sizes = p.square().sum(dim=(0, 1))  # of each column, over experts and rows: falls like Sigma^2
        assert float(sizes[0] / sizes[-1]) > 1.5
        one, other = self.value("P") @ self.value("S"), self.value("P", beta=2.0) @ self.value("S", beta=2.0)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)

    def test_the_first_gradient_of_p_grows_with_beta_and_that_of_s_falls(self) -> None:
        """Equation 16, after one step of B, which starts at zero: both are proportional exactly."""
        norms = {}
        for beta in (0.5, 1.0, 2.0):
            spec = AdapterSpec(beta=beta, num_lora_experts=4)
            p = {
                name: initial_parameter(spec.declared, name, 64, 48, 1, 0, "q_proj").double().requires_grad_()
                for name in spec.declared.parameters
            }
            g = torch.Generator().manual_seed(0)
            x, weight, target = (
                torch.randn(s, dtype=torch.float64, generator=g) for s in ((32, 64), (48, 64), (32, 48))
            )
            for step in range(2):
                loss = (adapted_forward(spec.declared, p, x, weight)[0] - target).square().sum()
                grads = dict(zip(p, torch.autograd.grad(loss, list(p.values())), strict=True))
                if step == 0:
                    assert not grads["P"].any(), "B is zero"
                    with torch.no_grad():
                        p["B"] -= 1e-3 * grads["B"]
            norms[beta] = grads["P"].norm(), grads["S"].norm()
        for beta in (0.5, 2.0):
            torch.testing.assert_close(norms[beta][0], norms[1.0][0] * beta, rtol=1e-5, atol=0)
            torch.testing.assert_close(norms[beta][1], norms[1.0][1] / beta, rtol=1e-5, atol=0)

    def test_experts_can_be_drawn_apart(self) -> None:
        torch.testing.assert_close(self.value("P", experts=[5, 2]), self.value("P")[[5, 2]], rtol=0, atol=0)

    def test_seed_layer_and_expert_all_matter(self) -> None:
        p = self.value("P")
        assert not torch.equal(p[0], p[1])
        assert not torch.equal(p, self.value("P", seed=2))
        assert not torch.equal(p, initial_parameter(AdapterSpec().declared, "P", self.N, 64, 1, 4, "q_proj"))

    def test_equal_starts(self) -> None:
        method = AdapterSpec(method="molora_equal_start").declared
        a = initial_parameter(method, "A", 32, 16, 1, 0, "q_proj", experts=[1, 5])
        assert torch.equal(a[0], a[1])
        assert a.is_contiguous()


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
            ({"beta": 0.0}, "beta=0.0"),
            ({"beta": float("inf")}, "beta=inf"),
            ({"aux_loss_coeff": -1.0}, "aux_loss_coeff=-1.0"),
            ({"freeze": ["A"]}, "freeze='A': is no parameter of method=malora"),
            ({"freeze": ["router", "S", "P", "B"]}, "freeze=['router', 'S', 'P', 'B']: leaves nothing to train"),
            ({"method": "malora_unshared", "shared_dim": 30}, "shared_dim=30: must be divisible by num_lora_experts=8"),
        ],
    )  # fmt: skip
    def test_a_wrong_field_is_named(self, fields: dict[str, object], named: str) -> None:
        with pytest.raises(ConfigError) as error:
            AdapterSpec(**fields).validate_adapter()  # type: ignore[arg-type]
        assert str(error.value).startswith(named)
        assert ";" in str(error.value)  # a cure follows the rule

    @pytest.mark.parametrize("method", list(METHODS))
    def test_defaults_are_valid_and_the_methods_own(self, method: str) -> None:
        spec = AdapterSpec(method=method)
        spec.validate_adapter()
        assert spec.lora_rank == (12 if method.startswith("malora") else 8)
        assert spec.lora_alpha == 2 * spec.lora_rank

    def test_alpha_follows_a_rank_that_is_given(self) -> None:
        assert AdapterSpec(lora_rank=64).declared.scaling == 2.0

    def test_megatron_names_are_understood(self) -> None:
        assert AdapterSpec(target_modules=["linear_fc1", "q_proj"]).projections == ("q_proj", "gate_proj", "up_proj")

    def test_wasted_rank_is_warned_of(self) -> None:
        assert "shared_dim=4" in AdapterSpec(shared_dim=4).declared.warnings()[0]
        assert AdapterSpec().declared.warnings() == []

    @pytest.mark.parametrize("name", ["malora", "malora_b"])
    def test_a_projection_narrower_than_the_subspace_is_refused(self, name: str) -> None:
        with pytest.raises(ConfigError, match=r"shared_dim=32: must not exceed the \w+ width 16 of k_proj"):
            AdapterSpec(method=name).declared.check_widths("k_proj", 16, 16)

    def test_what_must_not_change_on_resume_is_what_the_method_uses(self) -> None:
        assert "shared_dim" in AdapterSpec().identity()
        assert not {"shared_dim", "topk"} & AdapterSpec(method="lora").identity().keys()
        assert "beta" not in AdapterSpec().identity(), "it scales the start, not the function"


def test_a_declaration_names_its_axes() -> None:
    for axes in (("rank", "inn"), ("rank", "expert")):
        with pytest.raises(AssertionError):
            Param(*axes)


@pytest.mark.parametrize(("axis", "style"), list(product(("in", "out"), ("column", "row"))))
def test_only_the_sharded_axis_is_sharded(axis: str, style: str) -> None:
    sharded = {"column": "out", "row": "in"}[style]
    assert (Param("rank", axis).placement(style).tp_axis is not None) is (axis == sharded)  # type: ignore[arg-type]


def test_a_method_inherits_and_overrides_parameters() -> None:
    class Narrow(METHODS["lora"]):  # type: ignore[misc]
        A = Param("rank", "in", trained=False)

    assert list(Narrow.parameters) == ["A", "B"]
    assert not Narrow.parameters["A"].trained
    assert METHODS["lora"].parameters["A"].trained
    assert issubclass(Narrow, Method)


def test_an_inherited_chain_ends_where_the_maths_is_another() -> None:
    class Bent(METHODS["molora"]):  # type: ignore[misc]
        def expert(self, p, z_TD):  # type: ignore[no-untyped-def]
            return super().expert(p, z_TD).relu()

    assert Bent.chain is None
    assert METHODS["molora"].chain is not None
    assert METHODS["asymmetric_lora"].chain is not None


def test_a_registered_name_is_taken() -> None:
    class Lora(METHODS["molora"]):  # type: ignore[misc]  # a copy that was not renamed
        pass

    with pytest.raises(ValueError, match="method='lora' is already malora_dist"):
        METHODS.register("lora")(Lora)
    with METHODS.registered(mine=Lora):
        assert METHODS["mine"] is Lora
    assert "mine" not in METHODS


def test_a_length_of_dora_moves_a_bfloat16_output_by_less_than_bfloat16_steps() -> None:
    """Next to 1 bfloat16 has a step of 0.8%: a factor of 1.003 would be none, yet outputs move."""
    declared = AdapterSpec(method="dora").declared
    y = torch.linspace(1, 2, 4096).bfloat16().unsqueeze(0)
    scaled = declared.output({"magnitude": torch.full((4096,), 1.003)}, y, torch.ones(4096))
    assert float((scaled.float() / y.float()).mean()) == pytest.approx(1.003, abs=1e-3)
