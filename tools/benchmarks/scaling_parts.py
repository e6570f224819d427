"""What scaling.py compares: models, contenders, layouts, and how many numbers of each a rank trains or gathers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from scaling_cluster import Group
from transformers import LlamaConfig

from malora_dist.exchange.base import EXCHANGES, Site
from malora_dist.exchange.plan import cheapest_exchange
from malora_dist.methods.base import Style
from malora_dist.methods.spec import MEGATRON_LINEARS, AdapterSpec

BF16, FP32 = 2, 4


@dataclass(frozen=True)
class Linear:
    """One of megatron's linears: the projections `widths` fused into it, over the same n inputs."""

    name: str
    in_features: int
    widths: tuple[int, ...]
    style: Style

    def sites(self, spec: AdapterSpec, tp: int, ep: int, tokens: int, itemsize: int = BF16) -> list[Site]:
        """Its adapters on one rank: one per adapted projection, or with ``fuse_projections`` one.

        Args:
            tokens: of one data-parallel rank, in whatever the site's bytes are asked for.
        """
        width_of = dict(zip(MEGATRON_LINEARS[self.name], self.widths, strict=True))
        served = [projections for _, projections in spec.adapters if projections[0] in width_of]
        outs = [sum(width_of[projection] for projection in projections) for projections in served]
        return [Site(spec.declared, self.in_features, m, self.style, tp, ep, tokens, itemsize) for m in outs]


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

    @classmethod
    def of(cls, hf: LlamaConfig) -> Model:
        """A Llama that other benchmarks train."""
        assert hf.head_dim is not None, "transformers fills it in"
        heads, kv_heads = hf.num_attention_heads, hf.num_key_value_heads or hf.num_attention_heads
        widths = (hf.hidden_size, hf.intermediate_size, hf.num_hidden_layers, heads, kv_heads)
        return cls("", *widths, vocab=hf.vocab_size, head_dim=hf.head_dim)

    @cached_property
    def linears(self) -> tuple[Linear, ...]:
        h, q, kv = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        return (
            Linear("linear_qkv", h, (q, kv, kv), style="column"),
            Linear("linear_proj", q, (h,), style="row"),
            Linear("linear_fc1", h, (self.ffn, self.ffn), style="column"),
            Linear("linear_fc2", self.ffn, (h,), style="row"),
        )

    def adapted(self, spec: AdapterSpec) -> list[Linear]:
        """The linears with adapters."""
        return [linear for linear in self.linears if linear.sites(spec, 1, 1, 1)]

    @property
    def layer_numbers(self) -> int:
        """Frozen weights of one layer; norms are left out."""
        return sum(linear.in_features * sum(linear.widths) for linear in self.linears)


@dataclass(frozen=True, eq=False)  # by identity: a key of a cache
class Contender:
    """An adapter and a value of the config key ``dispatch``.

    Attributes:
        token_dispatch: the usual form of a mixture, always sorted by expert; else the cheaper of the two forms.
        float32_router: what if x were copied to float32 for the router and multiplied there, as is usual? Else the
            router is three bfloat16 parts in the product that reads x for S_A, malora_dist/kernels/project.py:
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


@lru_cache(maxsize=1024)
def sites_of(contender: Contender, linear: Linear, layout: Layout) -> list[Site]:
    """The adapters of one linear, with the tokens of a step."""
    return linear.sites(contender.spec, layout.tp, layout.ep, layout.tokens // layout.dp)


def dispatch_of(contender: Contender, linear: Linear, layout: Layout) -> str:
    """What ``dispatch`` comes to on one linear, as the trainer decides it: by the largest adapter."""
    sites = sites_of(contender, linear, layout)
    if layout.ep == 1 or not contender.spec.is_mixture or not sites:
        return "local"
    if contender.dispatch != "auto":
        return contender.dispatch
    return cheapest_exchange(max(sites, key=lambda site: site.out_features))


def projected_width(site: Site) -> int:
    """Rows of what multiplies every token before dispatch: S_A, LoRA's A; none where x itself is sent."""
    return 0 if site.method.sent == "in" else site.sent_width


def numbers_at_hand(site: Site, name: str, ep: int) -> float:
    """Of a parameter, on one rank that computes with 1 / EP of its experts.

    Beside a row-parallel linear an expert's parameter that meets x itself is gathered over TP: tokens come whole.
    """
    param = site.method.parameters[name]
    shares = ep if param.is_expert else 1
    is_gathered = param.is_expert and site.style == "row" and "in" in param.axes
    return site.numbers(name) * (site.tensor_parallel if is_gathered else 1) / shares


class Numbers(NamedTuple):
    """Trained numbers on one rank."""

    replicated: float
    experts: float
    over_tp: float  # of both, those whose gradients are summed over TP

    def with_moments(self, layout: Layout) -> float:
        """Those whose Adam state is on the rank: all, or with the distributed optimizer its share of the replicas."""
        if not layout.distributed_optimizer:
            return self.replicated + self.experts
        return self.replicated / layout.group("dp").size + self.experts / layout.group("edp").size


@lru_cache(maxsize=1024)
def layer_numbers(model: Model, contender: Contender, tp: int, ep: int) -> Numbers:
    """What has an expert axis is sharded over EP, what else there is replicated over DP; over TP as its axes say."""
    replicated = experts = over_tp = 0.0
    for linear in model.linears:
        for site in linear.sites(contender.spec, tp, ep, 1):
            for name, param in site.method.parameters.items():
                numbers = site.numbers(name) / (ep if param.is_expert else 1) * site.method.is_trained(name)
                experts += numbers if param.is_expert else 0
                replicated += 0 if param.is_expert else numbers
                over_tp += numbers if param.placement(site.style).tp_axis is None else 0
    return Numbers(replicated, experts, over_tp)


def trained_numbers(model: Model, contender: Contender, layout: Layout) -> Numbers:
    """Of all layers of a stage."""
    of_layer = layer_numbers(model, contender, layout.tp, layout.ep)
    return Numbers(*(number * model.layers / layout.pp for number in of_layer))


def held_bytes(model: Model, contender: Contender, layout: Layout) -> float:
    """Bytes of the copies of experts, and their gradients, that a rank holds through a step."""
    held = sum(
        EXCHANGES[dispatch_of(contender, linear, layout)].bytes_held(site)
        for linear in model.linears
        for site in sites_of(contender, linear, layout)
    )
    return model.layers / layout.pp * held
