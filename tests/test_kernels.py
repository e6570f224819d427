"""What training computes (malora_dist/kernels/) against the declared maths (methods/reference.py), on one process.

float64, so that only a different formula can differ; tolerance 1e-10 of an entry. float32 and bfloat16 where
grouped_mm has kernels: there the order of summation differs, the tolerances are those dtypes' roundings.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from malora_dist.kernels.columns import Columns
from malora_dist.kernels.experts import ExpertWeights, Tokens, add_experts, add_rows, choose_expert_compute
from malora_dist.kernels.project import project_and_score
from malora_dist.methods.base import METHODS, Method
from malora_dist.methods.reference import sum_over_experts
from malora_dist.methods.routing import dense_gates, route
from malora_dist.methods.spec import AdapterSpec

T, N_IN, TOTAL = 12, 7, 12
#: The whole output; a slice of fc1; q of two query groups.
COLUMNS = {"whole": Columns(1, 0, TOTAL), "second half": Columns(1, 6, 6), "two groups": Columns(2, 1, 3)}


#: The methods with a router that have a chain, one of each kind: with and without a down-projection after dispatch.
CHAINED = [name for name, method in METHODS.items() if method.is_mixture() and method.chain is not None]


def inputs(method: Method, width: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """A base output, z, router logits and the parameters of the experts at hand, all leaves."""
    g = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "y": (T, TOTAL),
        "z": (T, method.widths(N_IN, width)[method.sent]),
        "logits": (T, method.num_experts),
    }
    experts = [name for name, param in method.parameters.items() if param.is_expert]
    shapes |= {name: method.shape(name, N_IN, width) for name in experts}
    return {name: torch.randn(shape, dtype=dtype, generator=g).requires_grad_() for name, shape in shapes.items()}


def malora(**fields: int) -> Method:
    return AdapterSpec(**{"num_lora_experts": 4, "lora_rank": 4, "shared_dim": 4, **fields}).declared  # type: ignore[arg-type]


def gradients(function: Callable[..., Tensor], given: dict[str, Tensor]) -> list[Tensor]:
    """The output and the gradients of all inputs, the base output's first."""
    output = function(**given)
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).cos().view_as(output)
    (output.double() * weights).sum().backward()
    return [output.detach(), *(tensor.grad for tensor in given.values())]  # type: ignore[misc]


def plain(method: Method, columns: Columns) -> Callable[..., Tensor]:
    def function(y: Tensor, z: Tensor, logits: Tensor, **experts: Tensor) -> Tensor:
        routing = route(logits, method.settings.topk, True)
        gates = dense_gates(routing.gates_TK, routing.experts_TK, method.num_experts)
        missing = {name: torch.empty(0) for name in method.parameters}  # act before dispatch
        delta = method.scaling * sum_over_experts(method, missing | experts, z, gates)
        added = torch.zeros_like(y)
        columns.of(added).copy_(delta.view(columns.of(added).shape))
        return y + added

    return function


def fast(method: Method, columns: Columns, form: str) -> Callable[..., Tensor]:
    def function(y: Tensor, z: Tensor, logits: Tensor, **experts: Tensor) -> Tensor:
        routing = route(logits, method.settings.topk, True)
        base = y * 1
        chain = method.chain
        assert chain is not None
        tokens = Tokens(z, routing.gates_TK.to(torch.promote_types(z.dtype, torch.float32)), routing.experts_TK)
        down = None if chain.down is None else experts[chain.down]
        weights = ExpertWeights(down, [experts[chain.up]], 1, method.scaling)
        result = add_experts(form, base, columns, tokens, weights)
        assert result.data_ptr() == base.data_ptr(), "added in place"
        return result

    return function


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("topk", [1, 2, 5])
@pytest.mark.parametrize("form", ["gated_block", "grouped"])
@pytest.mark.parametrize("name", CHAINED)
def test_value_and_every_gradient(name: str, form: str, topk: int, columns: str) -> None:
    spec = AdapterSpec(method=name, num_lora_experts=5, topk=topk, lora_rank=3, shared_dim=4).declared
    where = COLUMNS[columns]
    width = where.blocks * where.width
    expected = gradients(plain(spec, where), inputs(spec, width))
    got = gradients(fast(spec, where, form), inputs(spec, width))
    for want, have in zip(expected, got, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("form", ["gated_block", "grouped"])
def test_in_the_dtypes_of_training(form: str, dtype: torch.dtype, rtol: float) -> None:
    """Adapters stay float32; ranks and widths that grouped_mm would refuse are padded."""
    spec = malora(num_lora_experts=5, lora_rank=3, shared_dim=5)
    width = 16
    results = []
    for function, kind in ((plain(spec, Columns(1, 0, width)), torch.float64), (None, dtype)):
        given = inputs(spec, width)
        given["y"] = torch.zeros(T, width, dtype=kind).requires_grad_()
        given["z"] = given["z"].detach().to(dtype).to(kind).requires_grad_()
        if function is None:
            function = fast(spec, Columns(1, 0, width), form)
            given = {k: (v if k in ("y", "z") else v.detach().float().requires_grad_()) for k, v in given.items()}
        results.append([t.double() for t in gradients(function, given)])
    for want, have in zip(*results, strict=True):
        assert (have - want).abs().max() <= rtol * want.abs().max()


@pytest.mark.parametrize("form", ["gated_block", "grouped"])
def test_an_expert_without_tokens_and_no_tokens_at_all(form: str) -> None:
    for rows, idle in ((4, [0, 2]), (0, [0, 1, 2])):
        P = torch.randn(3, 2, 3, requires_grad=True)
        B = torch.randn(3, 8, 2, requires_grad=True)
        experts = torch.ones(rows, 1, dtype=torch.int64)
        y = add_experts(
            form,
            torch.zeros(rows, 8),
            Columns(1, 0, 8),
            Tokens(torch.randn(rows, 3), torch.ones(rows, 1), experts),
            ExpertWeights(P, [B], 1, 1.0),
        )
        y.sum().backward()
        for parameter in (P, B):
            assert parameter.grad is not None
            assert [e for e in range(3) if not parameter.grad[e].any()] == idle


@pytest.mark.parametrize("columns", COLUMNS)
def test_without_a_router(columns: str) -> None:
    where = COLUMNS[columns]
    width = where.blocks * where.width
    g = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=g).requires_grad_()

    def add_up(y: Tensor, z: Tensor, B: Tensor) -> Tensor:
        return add_experts("auto", y, where, Tokens(z, None, None), ExpertWeights(None, [B], 1, 0.5))

    y, z, B = leaf(T, TOTAL), leaf(T, 3), leaf(width, 3)
    assert torch.autograd.gradcheck(lambda y, z, B: add_up(y * 1, z, B), (y, z, B))
    delta = add_up(torch.zeros(T, TOTAL, dtype=torch.float64), z, B)
    torch.testing.assert_close(where.of(delta.detach()).flatten(1), (0.5 * z @ B.T).detach())


@pytest.mark.parametrize("columns", COLUMNS)
def test_add_rows(columns: str) -> None:
    """Several rows of one token, none of another."""
    where = COLUMNS[columns]
    y = torch.randn(4, TOTAL, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(5, where.blocks * where.width, dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([0, 3, 3, 1, 0])
    assert torch.autograd.gradcheck(lambda y, rows: add_rows(y * 1, rows, tokens, where), (y, rows))
    delta = add_rows(torch.zeros(4, TOTAL, dtype=torch.float64), rows.detach(), tokens, where)
    torch.testing.assert_close(where.of(delta)[3].flatten(), (rows[1] + rows[2]).detach())
    assert not delta[2].any()


def test_project_and_score() -> None:
    g = torch.Generator().manual_seed(0)
    x, down, router = (torch.randn(n, N_IN, dtype=torch.float64, generator=g).requires_grad_() for n in (T, 3, 5))
    assert torch.autograd.gradcheck(project_and_score, (x, down, router))
    z, logits = project_and_score(x, down, router)
    torch.testing.assert_close(z, x @ down.T)
    torch.testing.assert_close(logits, x @ router.T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_router_stays_float32_on_a_narrow_input(dtype: torch.dtype) -> None:
    check_narrow_input(dtype, torch.device("cpu"))


def check_narrow_input(dtype: torch.dtype, device: torch.device) -> None:
    """Logits and the router's gradient to float32's rounding, 500 times below bfloat16's; z and dx to x's own."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 256, generator=g).to(device, dtype).requires_grad_()
    down, router = (torch.randn(n, 256, generator=g).to(device).requires_grad_() for n in (3, 5))
    exact = [t.detach().double().requires_grad_() for t in (x, down, router)]
    outputs = project_and_score(x, down, router), (exact[0] @ exact[1].T, exact[0] @ exact[2].T)
    assert [t.dtype for t in outputs[0]] == [dtype, torch.float32]
    for z, logits in outputs:
        (z.double().square().sum() + logits.double().pow(3).sum()).backward()
    pairs = {"z": (outputs[0][0], outputs[1][0]), "logits": (outputs[0][1], outputs[1][1])}
    pairs |= {name: (t.grad, e.grad) for name, t, e in zip(("x", "S", "router"), (x, down, router), exact, strict=True)}
    for name, (got, expected) in pairs.items():
        tolerance = 5e-6 if name in ("logits", "router") else 1e-2
        error = (got.double() - expected).abs().max() / expected.abs().max()
        assert error < tolerance, f"{name}: off by {error:.1e} of the largest entry"


def test_auto_turns_from_the_gated_block_to_the_grouped_form_as_experts_grow() -> None:
    forms = [choose_expert_compute(n, 2, 10, "cpu") for n in (2, 8, 64, 512)]
    assert forms == ["gated_block", "gated_block", "grouped", "grouped"]
    assert choose_expert_compute(64, 32, 10, "cpu") == "gated_block", "many experts per token"


class Operators(TorchDispatchMode):
    """Names of the operators that run while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", ["gated_block", "grouped"])
def test_nothing_is_read_on_the_host(form: str) -> None:
    """On CUDA these operators would wait for the GPU; forward and backward do without them."""
    spec = malora()
    given = inputs(spec, 16, torch.float32)
    given["y"] = torch.zeros(T, 16, requires_grad=True)
    x, down, router = torch.randn(T, 8), torch.randn(4, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    function = fast(spec, Columns(1, 0, 16), form)
    with Operators() as seen:
        given["z"], given["logits"] = project_and_score(x, down, router)
        function(**given).sum().mul(1.0).cos().backward()
    assert len(seen.names) > 20
    waiting = {"_local_scalar_dense", "item", "nonzero", "masked_select", "bincount", "_unique2", "unique_dim"}
    assert not waiting & set(seen.names)


@pytest.mark.parametrize("form", ["gated_block", "grouped"])
def test_autograd_keeps_z_gates_and_numbers_only(form: str) -> None:
    """Nothing as wide as x or y, and nothing N * r' wide, per token."""
    spec = malora(num_lora_experts=8)
    tokens, width = 1000, 64
    x = torch.randn(tokens, 32)
    params = {name: torch.randn(spec.shape(name, 32, width), requires_grad=True) for name in ("S", "P", "B")}
    router = torch.randn(8, 32, requires_grad=True)
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        z, logits = project_and_score(x, params["S"], router)
        routing = route(logits, 2, True)
        y = torch.zeros(tokens, width)
        add_experts(
            form,
            y,
            Columns(1, 0, width),
            Tokens(z, routing.gates_TK, routing.experts_TK),
            ExpertWeights(params["P"], [params["B"]], 1, 1.0),
        )
    del kept[x.untyped_storage().data_ptr()]  # the linear's own input, not a copy
    per_token = sorted(t.numel() // tokens for t in kept.values() if t.shape[:1] == (tokens,))
    # gates (before and after they are normalised, and their sum), z, probabilities, expert numbers
    assert max(per_token) <= 8
    assert sum(per_token) <= 4 + 8 + 3 * 2 + 1 + 2


@pytest.mark.parametrize(
    ("form", "dtype"),
    [("gated_block", torch.float32), ("gated_block", torch.bfloat16), ("grouped", torch.bfloat16),
     ("auto", torch.float32)],
)  # fmt: skip
def test_torch_compile_traces_it_whole(form: str, dtype: torch.dtype) -> None:
    """fullgraph: one graph, no fallback to eager. The compiler knows grouped_mm in bfloat16 only."""
    num_experts = 64 if form == "auto" else 4  # where auto would choose the grouped form

    def layer(x: Tensor, weight: Tensor, down: Tensor, router: Tensor, P: Tensor, B: Tensor) -> Tensor:
        z, logits = project_and_score(x, down, router)
        routing = route(logits, 2, True)
        y = torch.nn.functional.linear(x, weight)
        tokens = Tokens(z, routing.gates_TK, routing.experts_TK)
        return add_experts(form, y, Columns(1, 0, 16), tokens, ExpertWeights(P, [B], 1, 1.0))

    results = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        n = num_experts
        shapes = (T, 8), (16, 8), (4, 8), (n, 8), (n, 8, 4), (n, 16, 8)
        kinds = dtype, dtype, *[torch.float32] * 4
        given = [torch.randn(s).to(kind).requires_grad_() for s, kind in zip(shapes, kinds, strict=True)]
        function(*given).cos().sum().mul(1.0).backward()
        results.append([t.grad for t in given])
    for eager, compiled in zip(*results, strict=True):
        assert (compiled - eager).abs().max() <= (1e-5 if dtype == torch.float32 else 3e-2) * eager.abs().max()


@pytest.mark.parametrize("form", ["gated_block", "grouped"])
def test_adjacent_projections_together(form: str) -> None:
    """As one after the other; kept for backward are their own B, not a copy side by side."""
    spec = malora(lora_rank=2, shared_dim=3)
    given = inputs(spec, 4)
    B2 = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)
    routing = route(given["logits"].detach(), 2, True)
    tokens = Tokens(given["z"], routing.gates_TK, routing.experts_TK)
    apart = [([given["B"]], Columns(2, 0, 2)), ([B2], Columns(2, 2, 1))]  # two groups of [2 | 1 | 3 columns of others]
    together = [([given["B"], B2], Columns(2, 0, 3))]
    leaves, results, kept = [given["z"], given["P"], given["B"], B2], [], set()

    def keep(tensor: Tensor) -> Tensor:
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    for calls in (apart, together):
        kept.clear()
        y = given["y"] * 1
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            for ups, columns in calls:
                y = add_experts(form, y, columns, tokens, ExpertWeights(given["P"], ups, 2, spec.scaling))
        results.append([y.detach(), *torch.autograd.grad(y.cos().sum(), leaves)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-12)
    assert {t.untyped_storage().data_ptr() for t in leaves} <= kept
    assert len(kept) == len(leaves) + 2  # gates and expert numbers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_gated_block_keeps_narrow_copies_where_it_may(dtype: torch.dtype) -> None:
    """Values and gradients are the same; in the parameters' own dtype nothing is kept."""
    spec = malora()
    given = inputs(spec, 16, torch.float32)
    routing = route(given["logits"].detach(), 2, True)
    tokens = Tokens(given["z"].detach().to(dtype), routing.gates_TK, routing.experts_TK)
    kept: dict = {}
    results = []
    for where in (None, kept, kept):
        weights = ExpertWeights(given["P"], [given["B"]], 1, spec.scaling, where)
        y = add_experts("gated_block", torch.zeros(T, 16, dtype=dtype), Columns(1, 0, 16), tokens, weights)
        results.append([y.detach(), *torch.autograd.grad(y.float().cos().sum(), [given["P"], given["B"]])])
    assert list(kept) == ([dtype] if dtype == torch.bfloat16 else [])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_an_unknown_form_is_no_form() -> None:
    spec = malora(lora_rank=2, shared_dim=3)
    with pytest.raises(KeyError, match="gated"):
        gradients(fast(spec, COLUMNS["whole"], "gated"), inputs(spec, TOTAL))
