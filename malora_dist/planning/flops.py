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

Besides, causal attention: for every pair of a query and a key that it sees, its own included, two products as wide as
all heads forward and four backward; (S + 1) / 2 keys a token in a sequence of S. And the output layer, h V forward and
h V backward for each position that has a loss. Norms, activations, gates and the optimizer count nothing, and what
activation recompute does again does not count either.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from malora_dist.families.base import DecoderConfig, projection_widths
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


@dataclass(frozen=True)
class StepFlops:
    """Operations of training steps, forward and backward, by what they are proportional to.

    Attributes:
        of_token: per token, padding left out.
        of_answer: per position with a loss.
        of_pair: per query and key that it sees.
        of_step: per step, whatever is in it.
    """

    of_token: float
    of_answer: float
    of_pair: float
    of_step: float

    def total(self, tokens: int, answers: int, pairs: float) -> float:
        """Of one step with so many of each."""
        return self.of_token * tokens + self.of_answer * answers + self.of_pair * pairs + self.of_step

    def of_sequences(self, tokens: int, seq_length: int) -> float:
        """Of one step of sequences that are all equally long and have a loss everywhere."""
        return self.total(tokens, tokens, tokens * (seq_length + 1) / 2)


def step_flops(hf: DecoderConfig, spec: AdapterSpec, form: Form) -> StepFlops:
    """Operations of the training steps of a model with adapters.

    Args:
        form: that experts are counted in; ``grouped`` counts the k that a token is routed to, which is what the model
            asks for, however they are computed.
    """
    method, widths = spec.declared, projection_widths(hf)
    of_token = of_pair = of_step = 0.0
    is_reached = False  # by a gradient: adapters lie below
    for _ in range(hf.num_hidden_layers):
        for linear, fused in MEGATRON_LINEARS.items():
            n = widths[fused[0]][0]
            if linear == "linear_proj":  # attention comes before it
                of_pair += (6 if is_reached else 2) * n
            of_token += (2 if is_reached else 1) * n * sum(widths[projection][1] for projection in fused)
            adapters = [projections for _, projections in spec.adapters if projections[0] in fused]
            for projections in adapters:
                outs = [widths[projection][1] for projection in projections]
                of_token += adapter_macs(method, n, sum(outs), form, is_reached)
                of_step += sum(norms_macs(method, n, m) for m in outs)
            is_reached |= bool(adapters)
    return StepFlops(2 * of_token, 2 * 2 * hf.hidden_size * hf.vocab_size, 2 * of_pair, 2 * of_step)
