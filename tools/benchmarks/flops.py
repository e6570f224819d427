"""Floating-point operations of a training step, counted from the shapes: the floor that a step's time is held against.

Multiply-accumulates per token (one is two operations) of a linear layer from n to m:

    frozen weight     n m forward, n m for the gradient of its input
    an adapter        the numbers of each of its matrices, times the products it takes part in: one forward, one for the
                      gradient of its input, one for its own if it is trained

A matrix with an expert axis counts for k experts where tokens are sorted by expert (``grouped``), and for all N in the
gated block form. So, from their declarations (malora_dist/methods/):

    LoRA              3 r n + 3 r m
    asymmetric LoRA   2 r n + 3 r m: A has no gradient
    DoRA              as LoRA, and once a step the norms of W0 + s B A: r n m, and small products
    MoLoRA            3 N n (router) + c (3 r n + 3 r m)
    MALoRA            3 N n (router) + 3 d n (S_A) + c (3 r d + 3 r m)         c = k or N

With ``fuse_projections`` what has no output axis counts once for a fused linear. The embeddings are frozen: up to the
first adapters nothing needs the gradient of its input.

Besides, causal attention over S positions: (S + 1) / 2 keys a token on average, two products forward and four backward,
and the output layer, h V forward and h V backward. Norms, activations, gates and the optimizer count nothing.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from malora_dist.families.base import projection_widths
from malora_dist.methods.base import Method
from malora_dist.methods.spec import MEGATRON_LINEARS, AdapterSpec

Form = Literal["gated_block", "grouped"]


def adapter_macs(method: Method, n: int, m: int, form: Form, input_grad: bool = True) -> int:
    """Multiply-accumulates of one adapter per token, forward and backward.

    Args:
        m: of all projections that the adapter serves together.
        input_grad: whether the gradient of x is wanted.
    """
    experts = method.settings.topk if form == "grouped" and method.is_mixture() else method.num_experts
    widths = method.widths(n, m) | {"expert": experts}
    macs, has_trained = 0, False
    for name, param in method.parameters.items():  # in the order in which x meets them
        if len(param.axes) < 2:
            continue  # scales its input, a product with no sum
        wants_input_grad = input_grad or ("in" not in param.axes and has_trained)
        products = 1 + wants_input_grad + method.is_trained(name)
        macs += products * math.prod(widths[axis] for axis in param.axes)
        has_trained |= method.is_trained(name)
    return macs


def norms_macs(method: Method, n: int, m: int) -> float:
    """Multiply-accumulates of ``Method.squared_norms`` of one projection, which are computed once a step."""
    if not method.needs_norms():
        return 0.0
    params = {name: torch.empty(method.shape(name, n, m), device="meta") for name in method.parameters}
    with FlopCounterMode(display=False) as counter:
        method.squared_norms(params, torch.empty(m, n, device="meta"))
    return counter.get_total_flops() / 2


def square_macs(method: Method, width: int, form: Form) -> int:
    """Multiply-accumulates per token of one square linear, frozen weight and adapter, inside a model."""
    return 2 * width**2 + adapter_macs(method, width, width, form)


def step_flops(hf: LlamaConfig, spec: AdapterSpec, form: Form, tokens: int, seq_length: int) -> float:
    """Operations of one training step.

    Args:
        tokens: of the step, in sequences of ``seq_length`` without padding.
    """
    method, widths = spec.declared, projection_widths(hf)
    macs = 2.0 * hf.hidden_size * hf.vocab_size
    is_reached = False  # by a gradient: adapters lie below
    for _ in range(hf.num_hidden_layers):
        for linear, fused in MEGATRON_LINEARS.items():
            n = widths[fused[0]][0]
            if linear == "linear_proj":  # attention comes before it
                macs += (6 if is_reached else 2) * (seq_length + 1) / 2 * n
            macs += (2 if is_reached else 1) * n * sum(widths[projection][1] for projection in fused)
            adapters = [projections for _, projections in spec.adapters if projections[0] in fused]
            for projections in adapters:
                outs = [widths[projection][1] for projection in projections]
                macs += adapter_macs(method, n, sum(outs), form, is_reached)
                macs += sum(norms_macs(method, n, m) for m in outs) / tokens
            is_reached |= bool(adapters)
    return 2 * macs * tokens
