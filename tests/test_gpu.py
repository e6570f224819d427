"""What only a GPU shows; skips elsewhere.

The bodies take the device, so that on a CPU their code has run at least; what only CUDA does is in the tests.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from malora_dist.kernels.columns import Columns
from malora_dist.kernels.experts import ExpertWeights, Tokens, add_experts
from malora_dist.kernels.project import project_and_score
from malora_dist.methods.initial import initial_parameter
from malora_dist.methods.reference import sum_over_experts
from malora_dist.methods.routing import dense_gates, route, router_logits
from malora_dist.methods.spec import AdapterSpec

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def parameters(spec: AdapterSpec, device: torch.device) -> dict[str, Tensor]:
    """Of one adapter, 64 -> 32, none of them zero."""
    method = spec.declared
    params = {name: initial_parameter(method, name, 64, 32, 0, 0, "q_proj").to(device) for name in method.parameters}
    params["B"] = torch.randn_like(params["B"])
    return {name: value.requires_grad_() for name, value in params.items()}


def through_exchange(dispatch: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """(outputs, gradient of x) of one MALoRA adapter whose tokens go through an exchange of one rank."""
    from malora_dist.config import Config
    from malora_dist.exchange.base import EXCHANGES
    from malora_dist.parallel import topology as layout

    topology = layout.initialize(Config(device=device.type))
    try:
        spec = AdapterSpec(num_lora_experts=4, lora_rank=8, shared_dim=16)
        method, params = spec.declared, parameters(spec, device)
        x = torch.randn(33, 64, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
        exchange = EXCHANGES[dispatch](4, topology.ep_group, device)
        [arrived] = exchange.dispatch([method.project(params, x)], [route(router_logits(x, params["router"]), 2, True)])
        z, gates_TK, experts_TK = arrived.tokens
        rows = sum_over_experts(method, params, z, dense_gates(gates_TK, experts_TK, 4))
        back, token_of_row = exchange.send_back(rows, arrived)()
        y = torch.zeros(33, 32, device=device).index_add(0, token_of_row, back)
        y.square().sum().backward()
        return y.detach(), x.grad  # type: ignore[return-value]
    finally:
        layout.destroy()


def bfloat16_step(form: str, device: torch.device) -> Callable[[], None]:
    """Forward and backward of one adapter's kernels."""
    spec = AdapterSpec(num_lora_experts=8, lora_rank=8, shared_dim=16)
    params = parameters(spec, device)
    x = torch.randn(33, 64, device=device, dtype=torch.bfloat16, requires_grad=True)

    def step() -> None:
        z, logits = project_and_score(x, params["S"], params["router"])
        routing = route(logits, 2, True)
        y = torch.zeros(33, 32, device=device, dtype=torch.bfloat16)
        tokens = Tokens(z, routing.gates_TK, routing.experts_TK)
        y = add_experts(form, y, Columns(1, 0, 32), tokens, ExpertWeights(params["P"], [params["B"]], 1, 1.0))
        y.square().sum().backward()

    return step


def test_the_bodies_run_on_a_cpu() -> None:
    y, grad = through_exchange("local", torch.device("cpu"))
    assert y.any()
    assert grad.any()
    bfloat16_step("gated_block", torch.device("cpu"))()


@needs_gpu
def test_real_fmoe_agrees_with_the_local_exchange() -> None:
    """fastmoe's own scatter and gather on one rank: output and gradients."""
    pytest.importorskip("fmoe", reason="fmoe is not installed (it is built from source)")
    device = torch.device("cuda", 0)
    for local, fastmoe in zip(through_exchange("local", device), through_exchange("fastmoe", device), strict=True):
        torch.testing.assert_close(fastmoe, local, rtol=1e-3, atol=1e-3)  # TF32 may be on


@needs_gpu
def test_the_router_in_bfloat16_parts_is_float32() -> None:
    """The kernel that sums bfloat16 products in float32 is CUDA's alone."""
    from tests.test_kernels import check_narrow_input

    check_narrow_input(torch.bfloat16, torch.device("cuda", 0))


@needs_gpu
@pytest.mark.parametrize("form", ["gated_block", "grouped"])
def test_experts_at_hand_never_wait_for_the_gpu(form: str) -> None:
    """In bfloat16; torch raises at the first operation that would synchronise."""
    step = bfloat16_step(form, torch.device("cuda", 0))
    step()  # what is set up once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
