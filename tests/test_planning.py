"""Operations of a step against hand counts, and what devices can do."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig

from malora_dist.methods.spec import AdapterSpec
from malora_dist.planning.devices import peak_tflops
from malora_dist.planning.flops import Form, adapter_macs, norms_macs, step_flops

N_IN, N_OUT, N, K, R, D = 96, 64, 8, 2, 12, 32
P_AND_B = 3 * R * (D + N_OUT)


@pytest.mark.parametrize(
    ("method", "form", "with_x", "without_x"),
    [
        ("lora", "gated_block", 3 * R * (N_IN + N_OUT), R * (2 * N_IN + 3 * N_OUT)),
        ("asymmetric_lora", "gated_block", R * (2 * N_IN + 3 * N_OUT), R * (N_IN + 2 * N_OUT)),
        ("dora", "gated_block", 3 * R * (N_IN + N_OUT), R * (2 * N_IN + 3 * N_OUT)),
        ("molora", "grouped", 3 * (N + K * R) * N_IN + 3 * K * R * N_OUT, None),
        ("malora", "gated_block", 3 * (N + D) * N_IN + N * P_AND_B, 2 * (N + D) * N_IN + N * P_AND_B),
        ("malora", "grouped", 3 * (N + D) * N_IN + K * P_AND_B, None),
        ("hydralora", "gated_block", 3 * (N + R) * N_IN + 3 * N * R * N_OUT, None),
    ],
)
def test_operations_follow_from_the_declaration(method: str, form: Form, with_x: int, without_x: int | None) -> None:
    declared = AdapterSpec(method=method, lora_rank=R, shared_dim=D, num_lora_experts=N, topk=K).declared
    assert adapter_macs(declared, N_IN, N_OUT, form) == with_x
    if without_x is not None:
        assert adapter_macs(declared, N_IN, N_OUT, form, input_grad=False) == without_x


def test_norms_of_dora_are_counted_once_a_step() -> None:
    dora = AdapterSpec(method="dora", lora_rank=R).declared
    assert norms_macs(dora, N_IN, N_OUT) == R * N_IN * N_OUT + R * R * (N_IN + N_OUT)
    assert norms_macs(AdapterSpec(method="lora").declared, N_IN, N_OUT) == 0


H, F, V, LAYERS = 32, 48, 100, 2
HEADS, KV = 32, 16  # widths of all heads together
#: A layer's base linears: q and k and v, o, gate and up, down.
BASE = H * (HEADS + 2 * KV) + HEADS * H + 2 * H * F + F * H


@pytest.mark.parametrize(("topk", "experts"), [(2, 8), (2, 16), (3, 8)])
def test_a_step_of_malora(topk: int, experts: int) -> None:
    """By hand, two operations for each product with a sum: base 2 P forward and 2 P backward, adapters 2 and 4.

    The first layer's q, k, v lie above nothing trained, so they give no gradient to their input, and attention there
    gives one since q, k and v are adapted.
    """
    hf = LlamaConfig(
        hidden_size=H, intermediate_size=F, num_hidden_layers=LAYERS, vocab_size=V, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    spec = AdapterSpec(method="malora", topk=topk, num_lora_experts=experts, lora_rank=4, shared_dim=6)
    widths = [(H, HEADS), (H, KV), (H, KV), (HEADS, H), (H, F), (H, F), (F, H)]
    shared = [(6 + experts) * n for n, _ in widths]  # S and the router
    chosen = [topk * 4 * (6 + m) for _, m in widths]  # P and B of the experts of a token
    token = LAYERS * (4 * BASE + 6 * (sum(shared) + sum(chosen)))
    token -= 2 * H * (HEADS + 2 * KV) + 2 * sum(shared[:3])
    flops = step_flops(hf, spec, "grouped")
    assert flops.of_token == token
    assert flops.of_answer == 4 * H * V
    assert flops.of_pair == LAYERS * 12 * HEADS
    assert flops.of_step == 0
    # three sequences of 5 tokens, two of whose labels count
    assert flops.total(15, 6, 3 * 15) == 15 * token + 6 * 4 * H * V + 45 * LAYERS * 12 * HEADS
    assert flops.of_sequences(15, 5) == flops.total(15, 15, 45)


def test_peaks_of_devices() -> None:
    assert peak_tflops("NVIDIA H100 80GB HBM3", "bf16") == peak_tflops("NVIDIA H200", "bf16") == 989
    assert peak_tflops("NVIDIA H100 PCIe", "bf16") == 756
    assert peak_tflops("NVIDIA A100-SXM4-80GB", "tf32") == 156
    assert peak_tflops("NVIDIA L4", "fp32") == 30.3
    for unknown in ("cpu", "NVIDIA A100-SXM4-80GB MIG 1g.10gb", "NVIDIA L400", "NVIDIA GeForce RTX 4090 Laptop GPU"):
        assert peak_tflops(unknown, "bf16") == 0
