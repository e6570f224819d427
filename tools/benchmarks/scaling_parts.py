"""What scaling.py compares: models, methods, layouts, and how many numbers of each a rank trains or gathers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from malora_dist.exchange.cost import AdapterShape
from scaling_cluster import Group

from malora_dist.exchange import cost
from malora_dist.methods.spec import AdapterSpec

BF16, FP32 = 2, 4


@dataclass(frozen=True)
class Linear:
    """One of megatron's linears: the projections `widths` fused into it, over the same n inputs."""

    name: str
    in_features: int
    widths: tuple[int, ...]
    is_column: bool

    def shapes(self, spec: AdapterSpec, tp: int) -> list[AdapterShape]:
        """Its adapters: one per projection, or with ``fuse_projections`` one."""
        outs = (sum(self.widths),) if spec.fuse_projections else self.widths
        return [AdapterShape(self.in_features, m, self.is_column, tp) for m in outs]


@dataclass(frozen=True)
class Model:
    """A Llama."""

    name: str
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int = 128256
    head_dim: int = 128

    @cached_property
    def linears(self) -> tuple[Linear, ...]:
        h, q, kv = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        return (
            Linear("linear_qkv", h, (q, kv, kv), is_column=True),
            Linear("linear_proj", q, (h,), is_column=False),
            Linear("linear_fc1", h, (self.ffn, self.ffn), is_column=True),
            Linear("linear_fc2", self.ffn, (h,), is_column=False),
        )

    @property
    def layer_numbers(self) -> int:
        """Frozen weights of one layer; norms are left out."""
        return sum(linear.in_features * sum(linear.widths) for linear in self.linears)


@dataclass(frozen=True)
class Method:
    """An adapter and a value of the config key ``dispatch``.

    Attributes:
        token_dispatch: the usual form of a mixture, always sorted by expert; else the cheaper of the two forms.
        float32_router: what if x were copied to float32 for the router and multiplied there, as is usual? Else the
            router is three bfloat16 parts in the product that reads x for S_A, malora_dist/kernels/experts.py:
            backward splits the gradient of the logits for the weights' gradient, not for that of x.
    """

    name: str
    spec: AdapterSpec
    dispatch: str
    token_dispatch: bool = False
    float32_router: bool = False


@dataclass(frozen=True)
class Layout:
    """How a step lies on the GPUs.

    Attributes:
        tokens: of one step, over all ranks.
        micro_tokens: T.
    """

    gpus: int
    tp: int
    pp: int
    ep: int
    tokens: int
    micro_tokens: int
    seq_length: int
    recompute: bool = False
    distributed_optimizer: bool = False

    @property
    def dp(self) -> int:
        return self.gpus // (self.tp * self.pp)

    @property
    def microbatches(self) -> int:
        return self.tokens // (self.dp * self.micro_tokens)

    def group(self, name: str) -> Group:
        """megatron's rank order: TP, then EP, then the rest of DP, then PP."""
        return {
            "tp": Group(self.tp, 1),
            "ep": Group(self.ep, self.tp),
            "dp": Group(self.dp, self.tp),
            "edp": Group(self.dp // self.ep, self.tp * self.ep),
            "pp": Group(self.pp, self.tp * self.dp),
        }[name]


def dispatch_of(method: Method, linear: Linear, layout: Layout) -> str:
    """What ``dispatch`` comes to on one linear, as the trainer decides it: by the largest adapter."""
    if layout.ep == 1 or not method.spec.is_mixture:
        return "local"
    if method.dispatch != "auto":
        return method.dispatch
    largest = max(linear.shapes(method.spec, layout.tp), key=lambda shape: shape.out_features)
    return cost.cheaper_dispatch(method.spec, largest, layout.ep, layout.tokens // layout.dp, BF16)


def down_width(spec: AdapterSpec, in_features: int) -> int:
    """Width of what an expert's first factor reads: d, n, or none for LoRA, whose A is counted as the projection."""
    return {"malora": spec.shared_dim, "molora": in_features}.get(spec.method, 0)


def project_width(spec: AdapterSpec) -> int:
    """Rows of what every token is multiplied with: S_A, LoRA's A, or nothing."""
    return {"malora": spec.shared_dim, "molora": 0}.get(spec.method, spec.expert_rank)


class Numbers(NamedTuple):
    """Trained numbers on one rank, of all its layers."""

    replicated: float
    experts: float
    over_tp: float  # of both, those whose gradients are summed over TP

    def with_moments(self, layout: Layout) -> float:
        """Those whose Adam state is on the rank: all, or with the distributed optimizer its share of the replicas."""
        if not layout.distributed_optimizer:
            return self.replicated + self.experts
        return self.replicated / layout.group("dp").size + self.experts / layout.group("edp").size


def trained_numbers(model: Model, method: Method, layout: Layout) -> Numbers:
    """S_A, routers and LoRA are replicated over DP, experts sharded over EP; over TP as docs/architecture.md says."""
    spec, tp = method.spec, layout.tp
    replicated = experts = over_tp = 0.0
    for linear in model.linears:
        shapes = linear.shapes(spec, tp)
        at_hand = float(sum(cost.gathered_numbers(spec, shape) for shape in shapes))
        if not spec.is_mixture:
            replicated += at_hand
            over_tp += sum(spec.expert_rank * (s.in_features if s.is_column else s.out_features) for s in shapes)
            continue
        rows = len(shapes) * (project_width(spec) + spec.num_experts)
        shared = rows * linear.in_features / (1 if linear.is_column else tp)
        replicated += shared
        experts += at_hand / layout.ep
        over_tp += shared if linear.is_column else at_hand / layout.ep
    per_rank = model.layers / layout.pp
    return Numbers(replicated * per_rank, experts * per_rank, over_tp * per_rank)


def gathered_bytes(model: Model, method: Method, layout: Layout) -> float:
    """Bytes of the full copies of experts that gather_experts makes on a rank; their gradients take as much again."""
    gathered = [linear for linear in model.linears if dispatch_of(method, linear, layout) == "gather_experts"]
    shapes = [shape for linear in gathered for shape in linear.shapes(method.spec, layout.tp)]
    return model.layers / layout.pp * sum(cost.gathered_memory(method.spec, shape) / 2 for shape in shapes)
