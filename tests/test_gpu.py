"""What only a GPU shows; skips elsewhere."""

from __future__ import annotations

import pytest
import torch

from malora_dist.methods import maths
from malora_dist.methods.spec import AdapterSpec
from malora_dist.methods.start import initial_parameter

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def test_real_fmoe_agrees_with_the_local_dispatcher() -> None:
    """fastmoe's own scatter and gather on one rank: output and gradients of z and gates."""
    pytest.importorskip("fmoe", reason="fmoe is not installed (it is built from source)")
    from malora_dist.exchange.factory import make_dispatcher

    from malora_dist.config import Config
    from malora_dist.parallel import topology as layout

    device = torch.device("cuda", 0)
    topology = layout.initialize(Config(device="cuda"))
    try:
        spec = AdapterSpec(num_lora_experts=4, lora_rank=8, shared_dim=16)
        params = {
            name: initial_parameter(spec, name, 64, 32, 0, 0, "q_proj").to(device) for name in spec.parameter_names
        }
        params["B"] = torch.randn_like(params["B"])
        x = torch.randn(33, 64, device=device)
        results = []
        for dispatch in ("local", "fastmoe"):
            own = x.clone().requires_grad_()
            dispatcher = make_dispatcher(dispatch, 4, topology.ep_group, device)
            routing = maths.route(maths.router_logits(own, params["router"]), 2, True)
            [tokens] = dispatcher.dispatch([maths.project(spec, params, own)], [routing])
            gates_WE = maths.dense_gates(tokens.gates_WJ, tokens.experts_WJ, 4)
            rows, token_of_row = dispatcher.send_back(
                maths.expert_forward(spec, params, tokens.rows_WZ, gates_WE), tokens
            )()
            y = torch.zeros(33, 32, device=device).index_add(0, token_of_row, rows)
            y.square().sum().backward()
            results.append((y.detach(), own.grad))
        for local, fastmoe in zip(*results, strict=True):
            torch.testing.assert_close(fastmoe, local, rtol=1e-3, atol=1e-3)  # TF32 may be on
    finally:
        layout.destroy()


def test_the_router_in_bfloat16_parts_is_float32() -> None:
    """The kernel that sums bfloat16 products in float32 is CUDA's alone."""
    from tests.test_compute import check_narrow_input

    check_narrow_input(torch.bfloat16, torch.device("cuda", 0))


@pytest.mark.parametrize("form", ["gated_block", "grouped"])
def test_experts_at_hand_never_wait_for_the_gpu(form: str) -> None:
    """Forward and backward in bfloat16; torch raises at the first operation that would synchronise."""
    from malora_dist.kernels.experts import Columns, add_experts, project_and_score

    device = torch.device("cuda", 0)
    spec = AdapterSpec(num_lora_experts=8, lora_rank=8, shared_dim=16)
    params = {
        name: initial_parameter(spec, name, 64, 32, 0, 0, "q_proj").to(device).requires_grad_()
        for name in spec.parameter_names
    }
    x = torch.randn(33, 64, device=device, dtype=torch.bfloat16, requires_grad=True)

    def step() -> None:
        z, logits = project_and_score(x, params["S"], params["router"])
        routing = maths.route(logits, 2, True)
        y = torch.zeros(33, 32, device=device, dtype=torch.bfloat16)
        gates, experts = routing.gates_TK, routing.experts_TK
        y = add_experts(form, y, z, gates, experts, params["P"], [params["B"]], 1.0, Columns(1, 0, 32))
        y.square().sum().backward()

    step()  # what is set up once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
