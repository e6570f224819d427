"""Step time and memory per GPU of LoRA, MoLoRA and MALoRA on a cluster: every formula that scaling.py prints.

Nothing here is measured. Time is counted from the shapes: operations and bytes of what a rank computes, over the
cluster's rates, whichever takes longer; bytes of what it sends, over the link, plus a latency per step of a collective.
The bytes of the dispatches are those of ``dispatch: auto``, malora_dist/exchange/cost.py. Left out: uneven routing,
stragglers, data loading; kernels of embeddings, norms and activations, for which ``gemm_efficiency`` stands.

Words: T tokens of a microbatch on one data-parallel rank, n and m a projection's widths, d the shared width, N experts,
E of them at hand, R the rank of one expert, k topk. Activations are bfloat16, adapters and their state float32.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

from malora_dist.exchange.cost import AdapterShape
from scaling_cluster import Cluster, Group, Op
from scaling_parts import (
    BF16,
    FP32,
    Layout,
    Linear,
    Method,
    Model,
    dispatch_of,
    down_width,
    gathered_bytes,
    project_width,
    trained_numbers,
)

from malora_dist.exchange import cost
from malora_dist.methods.spec import AdapterSpec

# ---- compute


class Pass(NamedTuple):
    """A forward and a backward."""

    forward: list[Op]
    backward: list[Op]


def input_ops(method: Method, linear: Linear, tokens: float, tp: int) -> Pass:
    """Before dispatch, the adapters of one linear stacked: S_A (or A) and three bfloat16 parts of the router.

    Forward reads x. Backward reads x for the weights' gradients, writes the gradient of x, and adds it to the base's.
    Logits, softmax and top-k pass over [T, N] four times forward and six times backward. A router in float32 writes a
    float32 copy of x and reads that, forward and backward, and its gradient of x starts in float32.

    Args:
        tokens: T / TP.
    """
    spec, n, adapters = method.spec, linear.in_features, len(linear.shapes(method.spec, 1))
    width, experts = adapters * project_width(spec), adapters * spec.num_experts if spec.is_mixture else 0
    stacked, stacked_back = (0, 0) if method.float32_router else (3 * experts, 4 * experts)
    forward, backward = [], []
    if width + stacked:
        forward.append(Op(2 * tokens * n * (width + stacked), tokens * n * BF16, 1))
        backward.append(Op(2 * tokens * n * (2 * width + stacked_back), tokens * n * 5 * BF16, 3))
    if experts:
        gates = tokens * (tp if linear.is_column else 1) * experts * FP32
        forward.append(Op(0, 4 * gates, 4))
        backward.append(Op(0, 6 * gates, 6))
    if experts and method.float32_router:
        forward.append(Op(2 * tokens * n * experts, tokens * n * (BF16 + 2 * FP32), 2, is_float32=True))
        backward.append(Op(4 * tokens * n * experts, tokens * n * (3 * BF16 + 4 * FP32), 5, is_float32=True))
    return Pass(forward, backward)


def expert_ops(spec: AdapterSpec, shape: AdapterShape, tokens: float, ep: int, form: str) -> Pass:
    """The experts at hand on tokens * (ranks a token goes to) rows; at EP = 1 every token has all of them at hand.

    Gated block: the [rows, E R] inner values pass through memory 4 times forward and 13 times backward, the output
    twice each. Grouped: k slots a token are gathered, multiplied and added to their tokens' rows. Both cast the weights
    to bfloat16 and lay them out anew, and add their gradients in float32.

    Args:
        tokens: T / TP. Beside a column-parallel linear every TP rank has the z and inner values of all T.
    """
    m, rank, experts = shape.out_features, spec.expert_rank, spec.num_experts // ep
    same = shape.tensor_parallel if shape.is_column else 1
    w = down_width(spec, shape.in_features) * (same if spec.method == "malora" else 1)
    weights = cost.gathered_numbers(spec, shape) / ep
    if form == "grouped":
        slots = tokens * spec.topk
        flops = 2 * slots * (w + m) * rank
        forward = slots * BF16 * (3 * w + 4 * m + 4 * same * rank)
        backward = slots * BF16 * (8 * w + 4 * m + 13 * same * rank)
        kernels = 14
    else:
        rows = tokens * cost.expected_ranks(spec.num_experts, spec.topk, ep) if spec.is_mixture else tokens
        inner = experts * rank
        flops = 2 * rows * (w + m) * inner
        forward = rows * BF16 * (w + 2 * m + 4 * same * inner)
        backward = rows * BF16 * (6 * w + 2 * m + 13 * same * inner)
        kernels = 8 if spec.is_mixture else 2
    return Pass([Op(flops, forward + 12 * weights, kernels)], [Op(2 * flops, backward + 30 * weights, 2 * kernels)])


def rows_ops(spec: AdapterSpec, shape: AdapterShape, tokens: float, ep: int) -> Pass:
    """Around an all_to_all, in reads and writes of rows. Forward: gathered, gates joined to them, sent, received; zeros
    for the experts to add to, sent, received, added to their tokens. Backward the same without joining and zeros."""
    w, m = down_width(spec, shape.in_features), shape.out_features
    rows = tokens * cost.expected_ranks(spec.num_experts, spec.topk, ep)
    return Pass([Op(0, rows * BF16 * (6 * w + 6 * m), 10)], [Op(0, rows * BF16 * (5 * w + 4 * m), 10)])


def adapter_seconds(cluster: Cluster, method: Method, linear: Linear, layout: Layout) -> tuple[float, float]:
    """Forward and backward of one linear's adapters on one microbatch; TP shares tokens or columns evenly."""
    spec, tokens = method.spec, layout.micro_tokens / layout.tp
    moves_tokens = dispatch_of(method, linear, layout) == "all_to_all"
    ep = layout.ep if moves_tokens else 1

    def seconds(of: Pass) -> tuple[float, float]:
        return sum(map(cluster.seconds, of.forward)), sum(map(cluster.seconds, of.backward))

    parts = [seconds(input_ops(method, linear, tokens, layout.tp))]
    forms = ["grouped"] if method.token_dispatch else ["gated_block", "grouped"] if spec.is_mixture else ["gated_block"]
    for shape in linear.shapes(spec, layout.tp):
        parts.append(min((seconds(expert_ops(spec, shape, tokens, ep, form)) for form in forms), key=sum))
        if moves_tokens:
            parts.append(seconds(rows_ops(spec, shape, tokens, ep)))
    return sum(p[0] for p in parts), sum(p[1] for p in parts)


def base_flops(model: Model, layout: Layout) -> tuple[float, float]:
    """Forward and backward of the frozen base on one microbatch, all ranks together: no weight has a gradient."""
    linears = 2.0 * (model.layers * model.layer_numbers + model.hidden * model.vocab)
    attention = 4.0 * model.layers * model.heads * model.head_dim * (layout.seq_length + 1) / 2
    return layout.micro_tokens * (linears + attention), layout.micro_tokens * (linears + 2 * attention)


# ---- communication


def token_transfer(cluster: Cluster, method: Method, linear: Linear, layout: Layout) -> float:
    """Seconds one direction of a microbatch waits for all_to_all on one linear; backward waits as long.

    The way out (z or x, and gates) is waited for; the way back starts before the frozen GEMM and may end after it.
    """
    spec, ep = method.spec, layout.group("ep")
    out = back = 0.0
    for shape in linear.shapes(spec, layout.tp):
        rows = layout.micro_tokens * cost.expected_ranks(spec.num_experts, spec.topk, layout.ep)
        back_bytes = rows * (layout.ep - 1) / layout.ep * shape.out_features / layout.tp * BF16
        out_bytes = cost.all_to_all_bytes(spec, shape, layout.ep, layout.micro_tokens, BF16) / 2 - back_bytes
        out += cluster.all_to_all(ep, out_bytes)
        back += cluster.all_to_all(ep, back_bytes)
    frozen = 2 * linear.in_features * sum(linear.widths) * layout.micro_tokens / layout.tp
    hidden = cluster.overlap * frozen / (cluster.bf16_flops * cluster.gemm_efficiency)
    return out + max(0.0, back - hidden)


def counts_seconds(cluster: Cluster, layout: Layout) -> float:
    """Before rows travel the ranks tell each other how many: a small all_to_all, and the host reads the counts."""
    return cluster.all_to_all(layout.group("ep"), 8 * layout.ep) + cluster.host_sync_seconds


def adapter_tp_bytes(spec: AdapterSpec, linear: Linear, layout: Layout) -> float:
    """What the adapters of one linear bring across TP in one direction of a microbatch, all ranks' shards together."""
    logits = spec.num_experts * FP32 if spec.is_mixture else 0
    inner = spec.topk * spec.expert_rank * BF16 if spec.method == "molora" else project_width(spec) * FP32
    return layout.micro_tokens * len(linear.shapes(spec, layout.tp)) * (logits + inner)


# ---- a step


@dataclass(frozen=True)
class Times:
    """Seconds of one optimizer step on one rank: what it computes and what it waits for."""

    base: float
    adapters: float
    dispatch: float
    tensor: float
    pipeline: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


class Micro(NamedTuple):
    """Seconds of one microbatch on one stage, forward and backward."""

    base: float
    adapters: float
    dispatch: float
    tensor: float
    send: float
    first_forward: float  # of base and adapters, what gather_experts hides behind


def microbatch(cluster: Cluster, model: Model, method: Method, layout: Layout) -> Micro:
    """With recompute all of forward runs twice. Layers are dealt to the stages so that all take as long."""
    forwards, layers, tp = 2 if layout.recompute else 1, model.layers / layout.pp, layout.group("tp")
    rate = layout.tp * layout.pp * cluster.bf16_flops * cluster.gemm_efficiency
    base = [flops / rate for flops in base_flops(model, layout)]
    activations = layout.micro_tokens * model.hidden * BF16
    adapters, dispatch, tensor = [0.0, 0.0], 0.0, 0.0
    for linear in model.linears:
        for way, seconds in enumerate(adapter_seconds(cluster, method, linear, layout)):
            adapters[way] += seconds * layers
        if dispatch_of(method, linear, layout) == "all_to_all":
            dispatch += layers * (forwards + 1) * token_transfer(cluster, method, linear, layout)
            dispatch += layers * forwards * counts_seconds(cluster, layout)
        # Sequence parallelism gathers or scatters hidden states once a linear and direction; the adapters z and logits.
        crossing = cluster.all_gather(tp, activations)
        crossing += cluster.all_gather(tp, adapter_tp_bytes(method.spec, linear, layout))
        tensor += layers * (forwards + 1) * crossing
    stages = Group(min(layout.pp, 2), layout.group("pp").stride)
    return Micro(
        base=forwards * base[0] + base[1],
        adapters=forwards * adapters[0] + adapters[1],
        dispatch=dispatch,
        tensor=tensor,
        send=2 * cluster.all_to_all(stages, activations / layout.tp),
        first_forward=base[0] + adapters[0],
    )


def step_time(cluster: Cluster, model: Model, method: Method, layout: Layout) -> Times:
    """One optimizer step: the microbatches, the pipeline's bubble of PP - 1 of them, gradients, and the optimizer,
    which reads p, g, m, v, writes p, m, v, and passes over the gradients three times to clip and clear them."""
    count, micro = layout.microbatches, microbatch(cluster, model, method, layout)
    numbers = trained_numbers(model, method, layout)
    bubble = (layout.pp - 1) * (micro.base + micro.adapters + micro.dispatch + micro.tensor + micro.send)
    return Times(
        base=count * micro.base,
        adapters=count * micro.adapters,
        dispatch=count * micro.dispatch + gather_seconds(cluster, model, method, layout, micro.first_forward),
        tensor=count * micro.tensor,
        pipeline=count * micro.send + bubble,
        gradients=cluster.all_reduce(layout.group("dp"), FP32 * numbers.replicated)
        + cluster.all_reduce(layout.group("edp"), FP32 * numbers.experts)
        + cluster.all_reduce(layout.group("tp"), FP32 * numbers.over_tp),
        optimizer=numbers.with_moments(layout) * 10 * FP32 / (cluster.hbm * cluster.hbm_efficiency),
    )


def gather_seconds(cluster: Cluster, model: Model, method: Method, layout: Layout, forward: float) -> float:
    """What a step waits for gather_experts: the weights come, layer by layer, while the first microbatch runs forward;
    the gradients are reduce-scattered after the last."""
    copies = gathered_bytes(model, method, layout)
    if not copies:
        return 0.0
    layers = model.layers / layout.pp
    seconds = layers * cluster.all_gather(layout.group("ep"), copies / layers)
    return max(0.0, seconds - cluster.overlap * forward) + seconds


# ---- memory


@dataclass(frozen=True)
class Bytes:
    """Memory of the fullest rank."""

    base: float
    adapters: float
    gathered: float
    activations: float
    logits: float
    reserved: float

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


def layer_activations(model: Model, method: Method, layout: Layout) -> float:
    """Bytes a layer keeps of one token: inputs of the norms and linears, q, k, v, gate and up; for each adapter z (for
    MoLoRA's experts elsewhere the rows of x they were sent), router probabilities, gates and expert numbers."""
    spec, kv = method.spec, model.kv_heads * model.head_dim
    kept = BF16 * (6 * model.hidden + 2 * kv + 3 * model.ffn) / layout.tp
    for linear in model.linears:
        adapters = len(linear.shapes(spec, layout.tp))
        kept += adapters * BF16 * project_width(spec)
        if spec.is_mixture:
            kept += adapters * (FP32 * spec.num_experts + 12 * spec.topk)
        if dispatch_of(method, linear, layout) == "all_to_all":
            rows = cost.expected_ranks(spec.num_experts, spec.topk, layout.ep)
            kept += adapters * rows * BF16 * down_width(spec, linear.in_features) / layout.tp
    return kept


def memory(cluster: Cluster, model: Model, method: Method, layout: Layout) -> Bytes:
    """Weights in bfloat16; adapters with gradient and Adam's two moments; activations of the microbatches under way
    (1F1B); logits in bfloat16 and twice in float32."""
    numbers = trained_numbers(model, method, layout)
    ends = model.vocab * model.hidden * (2 if layout.pp == 1 else 1)
    per_token = layer_activations(model, method, layout)
    layers, under_way = model.layers / layout.pp, min(layout.pp, layout.microbatches)
    if layout.recompute:  # the layers' inputs, and one layer whole
        stage = layout.micro_tokens * (layers * BF16 * model.hidden / layout.tp)
        extra = layout.micro_tokens * per_token
    else:
        stage, extra = layout.micro_tokens * layers * per_token, 0.0
    logits = layout.micro_tokens * model.vocab / layout.tp * (BF16 + 2 * FP32)
    # The first stage keeps more microbatches, the last one microbatch and the logits.
    is_last_fuller = under_way == 1 or stage + logits > stage * under_way
    return Bytes(
        base=BF16 * (model.layer_numbers * layers + ends) / layout.tp,
        adapters=2 * FP32 * (numbers.replicated + numbers.experts + numbers.with_moments(layout)),
        gathered=2 * gathered_bytes(model, method, layout),
        activations=stage * (1 if is_last_fuller else under_way) + extra,
        logits=logits if is_last_fuller else 0.0,
        reserved=cluster.reserved,
    )
