"""Step time and memory per GPU of LoRA, MoLoRA and MALoRA on a cluster: every formula that scaling.py prints.

Nothing here is measured. Time is counted from the shapes: operations and bytes of what a rank computes, over the
cluster's rates, whichever takes longer; bytes of what it sends, over the link, plus a latency per step of a collective.
What an adapter's parameters are, and how wide what it sends, follows from its method's declaration; the bytes of a
dispatch are ``Exchange.bytes_sent``, malora_dist/exchange/. Left out: uneven routing, stragglers, data loading; kernels
of embeddings, norms and activations, for which ``gemm_efficiency`` stands.

Words: T tokens of a microbatch on one data-parallel rank, n and m a projection's widths, D the width of what is sent
to the experts, N experts, E of them at hand, R the rank of one expert, k topk. Activations are bfloat16, adapters and
their state float32. "Site": one adapter on one rank, malora_dist/exchange/base.py.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

from scaling_cluster import Cluster, Group, Op
from scaling_parts import (
    BF16,
    FP32,
    Contender,
    Layout,
    Linear,
    Model,
    dispatch_of,
    held_bytes,
    numbers_at_hand,
    projected_width,
    sites_of,
    trained_numbers,
)

from malora_dist.exchange.all_to_all import AllToAll, expected_ranks
from malora_dist.exchange.base import Site

# ---- compute


class Pass(NamedTuple):
    """A forward and a backward."""

    forward: list[Op]
    backward: list[Op]


def input_ops(contender: Contender, linear: Linear, tokens: float, tp: int) -> Pass:
    """Before dispatch, the adapters of one linear stacked: S_A (or A) and three bfloat16 parts of the router.

    Forward reads x. Backward reads x for the weights' gradients, writes the gradient of x, and adds it to the base's.
    Logits, softmax and top-k pass over [T, N] four times forward and six times backward. A router in float32 writes a
    float32 copy of x and reads that, forward and backward, and its gradient of x starts in float32.

    Args:
        tokens: T / TP.
    """
    n, sites = linear.in_features, linear.sites(contender.spec, tp, 1, 1)
    width = sum(map(projected_width, sites))
    experts = len(sites) * contender.spec.num_experts if contender.spec.is_mixture else 0
    stacked, stacked_back = (0, 0) if contender.float32_router else (3 * experts, 4 * experts)
    forward, backward = [], []
    if width + stacked:
        forward.append(Op(2 * tokens * n * (width + stacked), tokens * n * BF16, 1))
        backward.append(Op(2 * tokens * n * (2 * width + stacked_back), tokens * n * 5 * BF16, 3))
    if experts:
        gates = tokens * (tp if linear.style == "column" else 1) * experts * FP32
        forward.append(Op(0, 4 * gates, 4))
        backward.append(Op(0, 6 * gates, 6))
    if experts and contender.float32_router:
        forward.append(Op(2 * tokens * n * experts, tokens * n * (BF16 + 2 * FP32), 2, is_float32=True))
        backward.append(Op(4 * tokens * n * experts, tokens * n * (3 * BF16 + 4 * FP32), 5, is_float32=True))
    return Pass(forward, backward)


def expert_ops(site: Site, tokens: float, ep: int, form: str) -> Pass:
    """The experts at hand on tokens * (ranks a token goes to) rows; at EP = 1 every token has all of them at hand.

    Gated block: the [rows, E R] inner values pass through memory 4 times forward and 13 times backward, the output
    twice each. Grouped: k slots a token are gathered, multiplied and added to their tokens' rows. Both cast the weights
    to bfloat16 and lay them out anew, and add their gradients in float32.

    Args:
        tokens: T / TP. Beside a column-parallel linear every TP rank has what is sent and the inner values of all T.
    """
    method, chain = site.method, site.method.chain
    assert chain is not None, "what is compared has one"
    m, rank, mixture = site.out_features, method.rank, method.is_mixture()
    same = site.tensor_parallel if site.style == "column" else 1
    w = site.sent_width * same if chain.down else 0
    weights = sum(numbers_at_hand(site, name, ep) for name in (chain.down, chain.up) if name)
    if form == "grouped":
        slots = tokens * method.settings.topk
        flops = 2 * slots * (w + m) * rank
        forward = slots * BF16 * (3 * w + 4 * m + 4 * same * rank)
        backward = slots * BF16 * (8 * w + 4 * m + 13 * same * rank)
        kernels = 14
    else:
        rows = tokens * expected_ranks(method.num_experts, method.settings.topk, ep) if mixture else tokens
        inner = method.num_experts // ep * rank
        flops = 2 * rows * (w + m) * inner
        forward = rows * BF16 * (w + 2 * m + 4 * same * inner)
        backward = rows * BF16 * (6 * w + 2 * m + 13 * same * inner)
        kernels = 8 if mixture else 2
    return Pass([Op(flops, forward + 12 * weights, kernels)], [Op(2 * flops, backward + 30 * weights, 2 * kernels)])


def rows_ops(site: Site, tokens: float) -> Pass:
    """Around an all_to_all, in reads and writes of rows. Forward: gathered, gates joined to them, sent, received; zeros
    for the experts to add to, sent, received, added to their tokens. Backward the same without joining and zeros."""
    method, w, m = site.method, site.sent_width, site.returned_width
    ranks = expected_ranks(method.num_experts, method.settings.topk, site.expert_parallel)
    rows = tokens * (site.tensor_parallel if site.style == "column" else 1) * ranks
    return Pass([Op(0, rows * BF16 * (6 * w + 6 * m), 10)], [Op(0, rows * BF16 * (5 * w + 4 * m), 10)])


def adapter_seconds(cluster: Cluster, contender: Contender, linear: Linear, layout: Layout) -> tuple[float, float]:
    """Forward and backward of one linear's adapters on one microbatch; TP shares tokens or columns evenly."""
    tokens = layout.micro_tokens / layout.tp
    moves_tokens = dispatch_of(contender, linear, layout) == "all_to_all"
    ep = layout.ep if moves_tokens else 1

    def seconds(of: Pass) -> tuple[float, float]:
        return sum(map(cluster.seconds, of.forward)), sum(map(cluster.seconds, of.backward))

    forms = ["gated_block", "grouped"] if contender.spec.is_mixture else ["gated_block"]
    if contender.token_dispatch:
        forms = ["grouped"]
    parts = [seconds(input_ops(contender, linear, tokens, layout.tp))]
    for site in sites_of(contender, linear, layout):
        parts.append(min((seconds(expert_ops(site, tokens, ep, form)) for form in forms), key=sum))
        if moves_tokens:
            parts.append(seconds(rows_ops(site, tokens)))
    return sum(p[0] for p in parts), sum(p[1] for p in parts)


def base_flops(model: Model, layout: Layout) -> tuple[float, float]:
    """Forward and backward of the frozen base on one microbatch, all ranks together: no weight has a gradient."""
    linears = 2.0 * (model.layers * model.layer_numbers + model.hidden * model.vocab)
    attention = 4.0 * model.layers * model.heads * model.head_dim * (layout.seq_length + 1) / 2
    return layout.micro_tokens * (linears + attention), layout.micro_tokens * (linears + 2 * attention)


# ---- communication


def token_transfer(cluster: Cluster, contender: Contender, linear: Linear, layout: Layout) -> float:
    """Seconds one direction of a microbatch waits for all_to_all on one linear; backward waits as long.

    The way out (z or x, and gates) is waited for; the way back starts before the frozen GEMM and may end after it.
    """
    out = back = 0.0
    for site in linear.sites(contender.spec, layout.tp, layout.ep, layout.micro_tokens):
        both = AllToAll.bytes_sent(site) / 2  # backward the same again
        widths = site.sent_width + site.method.num_experts // layout.ep, site.returned_width
        out += cluster.all_to_all(layout.group("ep"), both * widths[0] / sum(widths))
        back += cluster.all_to_all(layout.group("ep"), both * widths[1] / sum(widths))
    frozen = 2 * linear.in_features * sum(linear.widths) * layout.micro_tokens / layout.tp
    hidden = cluster.overlap * frozen / (cluster.bf16_flops * cluster.gemm_efficiency)
    return out + max(0.0, back - hidden)


def counts_seconds(cluster: Cluster, layout: Layout) -> float:
    """Before rows travel the ranks tell each other how many: a small all_to_all, and the host reads the counts."""
    return cluster.all_to_all(layout.group("ep"), 8 * layout.ep) + cluster.host_sync_seconds


def crossing_seconds(cluster: Cluster, contender: Contender, linear: Linear, layout: Layout) -> float:
    """What the adapters of one linear bring across TP in one direction of a microbatch (layers/crossing.py).

    Logits and z cross as one float32 tensor; x, where x is sent, by itself and for every adapter: gathered beside a
    column-parallel linear, and beside a row-parallel one changed from shards of features to shards of tokens, for which
    the experts' parameters that meet x are gathered.
    """
    tp, method = layout.group("tp"), contender.spec.declared
    ep = layout.ep if dispatch_of(contender, linear, layout) == "all_to_all" else 1
    sites = sites_of(contender, linear, layout)
    logits = method.num_experts if method.is_mixture() else 0
    joined = sum(projected_width(site) + logits for site in sites) * FP32
    seconds = cluster.all_gather(tp, layout.micro_tokens * joined) if sites else 0.0
    if method.sent != "in" or layout.tp == 1:
        return seconds
    x_bytes = layout.micro_tokens * linear.in_features * BF16
    for site in sites:
        if site.style == "column":
            seconds += cluster.all_gather(tp, x_bytes)
        else:
            seconds += cluster.all_to_all(tp, x_bytes / layout.tp * (layout.tp - 1) / layout.tp)
            seconds += cluster.all_gather(tp, FP32 * numbers_meeting_x(site, ep))
    return seconds


def numbers_meeting_x(site: Site, ep: int) -> float:
    """Of the parameters that meet x at the experts, on a rank that computes with 1 / EP of these."""
    params = site.method.parameters.items()
    return sum(numbers_at_hand(site, name, ep) for name, param in params if param.is_expert and "in" in param.axes)


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


def microbatch(cluster: Cluster, model: Model, contender: Contender, layout: Layout) -> Micro:
    """With recompute all of forward runs twice. Layers are dealt to the stages so that all take as long."""
    forwards, layers, tp = 2 if layout.recompute else 1, model.layers / layout.pp, layout.group("tp")
    rate = layout.tp * layout.pp * cluster.bf16_flops * cluster.gemm_efficiency
    base = [flops / rate for flops in base_flops(model, layout)]
    activations = layout.micro_tokens * model.hidden * BF16
    adapters, dispatch, tensor = [0.0, 0.0], 0.0, 0.0
    for linear in model.linears:
        for way, seconds in enumerate(adapter_seconds(cluster, contender, linear, layout)):
            adapters[way] += seconds * layers
        if dispatch_of(contender, linear, layout) == "all_to_all":
            dispatch += layers * (forwards + 1) * token_transfer(cluster, contender, linear, layout)
            dispatch += layers * forwards * counts_seconds(cluster, layout)
        # Sequence parallelism gathers or scatters hidden states once a linear and direction.
        crossing = cluster.all_gather(tp, activations)
        crossing += crossing_seconds(cluster, contender, linear, layout)
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


def step_time(cluster: Cluster, model: Model, contender: Contender, layout: Layout) -> Times:
    """One optimizer step: the microbatches, the pipeline's bubble of PP - 1 of them, gradients, and the optimizer,
    which reads p, g, m, v, writes p, m, v, and passes over the gradients three times to clip and clear them."""
    count, micro = layout.microbatches, microbatch(cluster, model, contender, layout)
    numbers = trained_numbers(model, contender, layout)
    bubble = (layout.pp - 1) * (micro.base + micro.adapters + micro.dispatch + micro.tensor + micro.send)
    return Times(
        base=count * micro.base,
        adapters=count * micro.adapters,
        dispatch=count * micro.dispatch + gather_seconds(cluster, model, contender, layout, micro.first_forward),
        tensor=count * micro.tensor,
        pipeline=count * micro.send + bubble,
        gradients=cluster.all_reduce(layout.group("dp"), FP32 * numbers.replicated)
        + cluster.all_reduce(layout.group("edp"), FP32 * numbers.experts)
        + cluster.all_reduce(layout.group("tp"), FP32 * numbers.over_tp),
        optimizer=numbers.with_moments(layout) * 10 * FP32 / (cluster.hbm * cluster.hbm_efficiency),
    )


def gather_seconds(cluster: Cluster, model: Model, contender: Contender, layout: Layout, forward: float) -> float:
    """What a step waits for gather_experts: the weights come, layer by layer, while the first microbatch runs forward;
    the gradients are reduce-scattered after the last."""
    copies = held_bytes(model, contender, layout) / 2
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


def layer_activations(model: Model, contender: Contender, layout: Layout) -> float:
    """Bytes a layer keeps of a microbatch: inputs of the norms and linears, q, k, v, gate and up; for each adapter what
    its experts got (x itself is the linear's own input, unless it crossed TP), probabilities, gates, expert numbers."""
    spec, kv = contender.spec, model.kv_heads * model.head_dim
    per_token = BF16 * (6 * model.hidden + 2 * kv + 3 * model.ffn) / layout.tp
    weights = 0.0
    for linear in model.linears:
        moves_tokens = dispatch_of(contender, linear, layout) == "all_to_all"
        rows = expected_ranks(spec.num_experts, spec.topk, layout.ep) if moves_tokens else 1.0
        for site in sites_of(contender, linear, layout):
            if moves_tokens or layout.tp > 1 or projected_width(site):
                per_token += rows * BF16 * site.sent_width / (1 if site.style == "column" else layout.tp)
            if spec.is_mixture:
                per_token += FP32 * spec.num_experts + 12 * spec.topk
            if site.style == "row" and layout.tp > 1:  # gathered for this microbatch
                weights += FP32 * numbers_meeting_x(site, layout.ep if moves_tokens else 1)
    return layout.micro_tokens * per_token + weights


def memory(cluster: Cluster, model: Model, contender: Contender, layout: Layout) -> Bytes:
    """Weights in bfloat16; adapters with gradient and Adam's two moments; activations of the microbatches under way
    (1F1B); logits in bfloat16 and twice in float32."""
    numbers = trained_numbers(model, contender, layout)
    ends = model.vocab * model.hidden * (2 if layout.pp == 1 else 1)
    per_layer = layer_activations(model, contender, layout)
    layers, under_way = model.layers / layout.pp, min(layout.pp, layout.microbatches)
    if layout.recompute:  # the layers' inputs, and one layer whole
        stage = layout.micro_tokens * (layers * BF16 * model.hidden / layout.tp)
        extra = per_layer
    else:
        stage, extra = layers * per_layer, 0.0
    logits = layout.micro_tokens * model.vocab / layout.tp * (BF16 + 2 * FP32)
    # The first stage keeps more microbatches, the last one microbatch and the logits.
    is_last_fuller = under_way == 1 or stage + logits > stage * under_way
    return Bytes(
        base=BF16 * (model.layer_numbers * layers + ends) / layout.tp,
        adapters=2 * FP32 * (numbers.replicated + numbers.experts + numbers.with_moments(layout)),
        gathered=held_bytes(model, contender, layout),
        activations=stage * (1 if is_last_fuller else under_way) + extra,
        logits=logits if is_last_fuller else 0.0,
        reserved=cluster.reserved,
    )
