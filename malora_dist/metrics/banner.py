"""The start-up banner: layout, parameters by kind, memory per rank, and what computes what."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

import torch

from malora_dist.checkpoint.base import BaseInfo
from malora_dist.config import Config
from malora_dist.exchange.plan import ExchangePlan
from malora_dist.families.base import FAMILIES, DecoderConfig, projection_widths
from malora_dist.kernels.experts import choose_expert_compute
from malora_dist.layers.decoder import CausalModel
from malora_dist.methods.budget import adapter_parameters
from malora_dist.parallel.backends import adam_choice, attention_choice
from malora_dist.parallel.topology import Topology

_GIB = 2**30
_WIDTH = 88
_INDENT = 12


def _size(num_bytes: float) -> str:
    return f"{num_bytes / _GIB:.2f} GiB" if num_bytes >= 0.1 * _GIB else f"{num_bytes / 2**20:.1f} MiB"


def memory_estimate(
    model: Sequence[CausalModel], config: Config, hf: DecoderConfig, plan: ExchangePlan, topology: Topology
) -> dict[str, float]:
    """Bytes on this rank, by what holds them.

    Gathered experts: full copies and their gradients, where experts come to the tokens.

    Activations: what one layer keeps for the backward pass of a frozen base with adapters (the
    inputs of norms and linears, q, k, v, the attention output, gate, up and their product; about
    8 h + 3 kv + 4 f numbers a token), for the microbatches in flight on the first stage; an
    interleaved schedule has more of them in flight, (PP - 1) / (PP * chunks) of the whole. Full
    recompute keeps the layer's input only.
    """
    parameters = [p for chunk in model for p in chunk.parameters()]
    trained = [p for p in parameters if p.requires_grad]
    width = 2 if config.bf16 else 4
    _, kv = projection_widths(hf)["k_proj"]
    kept = hf.hidden_size
    if config.recompute_granularity != "full":
        kept = 8 * hf.hidden_size + 3 * kv + 4 * hf.intermediate_size
    per_token = kept * width / topology.tp_size
    layers = sum(len(chunk.decoder.layers) for chunk in model)
    pp, chunks = topology.pp_size, len(model)
    in_flight = pp + (pp - 1) / chunks if chunks > 1 else pp
    tokens = config.micro_batch_size * config.seq_length
    logits = tokens * hf.vocab_size * 8 / topology.tp_size
    gathered = float(plan.bytes_held * layers)
    return {
        "weights": sum(p.numel() * p.element_size() for p in parameters),
        **({"gathered experts": gathered} if gathered else {}),
        "gradients": 4.0 * sum(p.numel() for p in trained),
        "Adam": sum(8.0 * p.numel() / _optimizer_shards(p, config, topology) for p in trained),
        "activations": per_token * layers * tokens * in_flight + (logits if topology.is_last_stage else 0.0),
    }


def _optimizer_shards(parameter: torch.nn.Parameter, config: Config, topology: Topology) -> int:
    """Ranks that share the optimizer's state of a parameter: those that hold it, which experts' marks tell."""
    if not config.use_distributed_optimizer:
        return 1
    group = topology.dp_group if getattr(parameter, "allreduce", True) else topology.edp_group
    return group.size()


def stage_sizes(num_layers: int, pp_size: int, first: int, last: int) -> list[int]:
    """Layers of each pipeline stage: ``first`` and ``last`` where not 0, the rest shared evenly."""
    share = (num_layers - first - last) // max(pp_size - bool(first) - bool(last), 1)
    sizes = [share] * pp_size
    sizes[0] = first or sizes[0]
    sizes[-1] = last or sizes[-1]
    return sizes


def _expert_compute(config: Config, plan: ExchangePlan, topology: Topology) -> str:
    """How the experts at hand are computed, on the linears whose tokens travel and on the others."""
    if config.expert_compute != "auto":
        return f"{config.expert_compute} (asked for)"
    moves = sorted({exchange.moves_tokens for exchange in plan.exchanges.values()})
    at_hand = [config.num_experts // (topology.ep_size if moved else 1) for moved in moves]
    kind = topology.device.type
    forms = [choose_expert_compute(n, min(config.topk, n), config.declared.rank, kind) for n in at_hand]
    return ", ".join(f"{form} (auto: {n} experts at hand)" for form, n in zip(forms, at_hand, strict=True))


def _entries(
    model: Sequence[CausalModel],
    config: Config,
    hf: DecoderConfig,
    base: BaseInfo,
    plan: ExchangePlan,
    topology: Topology,
) -> Iterator[tuple[str, str]]:
    """(label, text) of each entry."""
    dtype, family = "bfloat16" if config.bf16 else "float32", FAMILIES[hf.model_type].name
    size = f"{base.num_parameters / 1e6:,.1f} M parameters"
    yield "base", f"{base.hf_model_name_or_path}: {family}, {size}, frozen, {dtype}"

    mixture = f", N={config.num_experts} experts, top-{config.topk}" if config.is_mixture else ""
    shared = f", d={config.shared_dim}" if config.declared.uses("shared") else ""
    yield "adapter", f"{config.method}: r={config.lora_rank}{shared}{mixture} on {', '.join(config.projections)}"

    kinds = adapter_parameters(config, projection_widths(hf), hf.num_hidden_layers)
    frozen = {kind for kind in kinds if not config.declared.is_trained(kind)}
    trainable = sum(number for kind, number in kinds.items() if kind not in frozen)
    counts = [f"{kind} {number:,}{' (frozen)' if kind in frozen else ''}" for kind, number in kinds.items()]
    share = 100 * trainable / base.num_parameters
    yield "trainable", f"{trainable:,} parameters ({share:.2f}% of the base): {', '.join(counts)}"

    yield "layout", topology.describe()
    first, last = config.decoder_first_pipeline_num_layers, config.decoder_last_pipeline_num_layers
    if len(model) > 1 or first or last:
        sizes = ", ".join(str(n) for n in stage_sizes(hf.num_hidden_layers, topology.pp_size, first, last))
        chunks = f", each in {len(model)} chunks that take turns (interleaved)" if len(model) > 1 else ""
        yield "stages", f"of {sizes} layers{chunks}"

    yield "dispatch", f"{plan.describe()} ({plan.reason})"
    if config.is_mixture:
        yield "experts", _expert_compute(config, plan, topology)
    for choice in (attention_choice(config, topology.device), adam_choice(config, topology.device)):
        yield choice.part, f"{choice.chosen} ({choice.reason})"
    yield "torch", torch.__version__

    memory = memory_estimate(model, config, hf, plan, topology)
    yield "memory", "per rank about " + ", ".join(f"{what} {_size(size)}" for what, size in memory.items())
    for text in config.declared.warnings():
        yield "warning", text


def banner(
    model: Sequence[CausalModel],
    config: Config,
    hf: DecoderConfig,
    base: BaseInfo,
    plan: ExchangePlan,
    topology: Topology,
) -> str:
    """The text of the banner.

    Args:
        model: this rank's chunks, more than one in an interleaved pipeline.
    """
    lines = [
        textwrap.fill(
            label.ljust(_INDENT) + text,
            width=_WIDTH,
            subsequent_indent=" " * _INDENT,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for label, text in _entries(model, config, hf, base, plan, topology)
    ]
    rule = "-" * _WIDTH
    return "\n".join((rule, *lines, rule))
