"""Floating-point operations of a training step, counted from the shapes: the floor that a step's time is held against.

Multiply-accumulates per token (one is two operations) of a linear layer from n to m:

    frozen weight     n m forward, n m for the gradient of its input
    LoRA              3 r n + 3 r m: a product forward, one for the gradient of the input, one for that of the weight
    asymmetric LoRA   2 r n + 3 r m: A has no gradient
    MoLoRA            3 N n (router) + c (3 r n + 3 r m)
    MALoRA            3 N n (router) + 3 d n (S_A) + c (3 r' d + 3 r' m)

with c = k experts per token where tokens are sorted by expert (``grouped``), and c = N in the gated block form. With
``fuse_projections`` what reads x counts once for a fused linear. The embeddings are frozen, so the first layer's q, k
and v need no gradient of their input: n m less, and one n-wide product of every adapter less (asymmetric LoRA: r m
besides).

Besides, causal attention over S positions: (S + 1) / 2 keys a token on average, two products forward and four backward,
and the output layer, h V forward and h V backward. Norms, activations, gates and the optimizer count nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from transformers import LlamaConfig

from malora_dist.families.base import projection_widths
from malora_dist.methods.spec import PROJECTIONS, AdapterSpec

Form = Literal["gated_block", "grouped"]


def adapter_macs(spec: AdapterSpec, n: int, widths: Sequence[int], form: Form, input_grad: bool = True) -> int:
    """Multiply-accumulates of one adapter per token, forward and backward.

    Args:
        widths: m of each projection that the adapter serves, one unless ``fuse_projections``.
        input_grad: whether the gradient of x is wanted.
    """
    rank, m = spec.expert_rank, sum(widths)
    reads_x = 3 if input_grad else 2  # products with a factor that reads x
    if spec.method == "asymmetric_lora":
        return (2 * n + 3 * m if input_grad else n + 2 * m) * rank  # without dx, A x needs no gradient either
    if not spec.is_mixture:
        return reads_x * rank * n + 3 * rank * m
    experts = spec.topk if form == "grouped" else spec.num_experts
    router = reads_x * spec.num_experts * n
    if spec.method == "molora":
        return router + experts * (reads_x * rank * n + 3 * rank * m)
    return router + reads_x * spec.shared_dim * n + experts * 3 * rank * (spec.shared_dim + m)


def square_macs(spec: AdapterSpec, width: int, form: Form) -> int:
    """Multiply-accumulates per token of one square linear, frozen weight and adapter, inside a model."""
    return 2 * width**2 + adapter_macs(spec, width, [width], form)


def step_flops(hf: LlamaConfig, spec: AdapterSpec, form: Form, tokens: int, seq_length: int) -> float:
    """Operations of one training step with an adapter on all seven projections.

    Args:
        tokens: of the step, in sequences of ``seq_length`` without padding.
    """
    assert spec.projections == PROJECTIONS, "counted for adapters on all projections"
    widths = projection_widths(hf)
    macs = 2.0 * hf.hidden_size * hf.vocab_size
    for layer in range(hf.num_hidden_layers):
        for _, group in spec.adapter_groups:
            n, outs = widths[group[0]][0], [widths[projection][1] for projection in group]
            input_grad = layer > 0 or group[0] not in ("q_proj", "k_proj", "v_proj")
            macs += (2 if input_grad else 1) * n * sum(outs) + adapter_macs(spec, n, outs, form, input_grad)
        macs += 6 * (seq_length + 1) / 2 * widths["q_proj"][1]
    return 2 * macs * tokens
