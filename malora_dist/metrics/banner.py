"""The start-up banner: layout, parameters by kind, memory per rank, what runs what."""

from __future__ import annotations

import math

import torch
from transformers import LlamaConfig

from malora_dist.checkpoint.base import BaseInfo
from malora_dist.config import Config
from malora_dist.models.llama import LlamaModel, projection_widths
from malora_dist.parallel.topology import Topology

_GIB = 2**30


def _size(num_bytes: float) -> str:
    return f"{num_bytes / _GIB:.2f} GiB" if num_bytes >= 0.1 * _GIB else f"{num_bytes / 2**20:.1f} MiB"


def memory_estimate(model: LlamaModel, config: Config, hf: LlamaConfig, topology: Topology) -> dict[str, float]:
    """Bytes on this rank, by what holds them.

    Activations: what one layer keeps for the backward pass of a frozen base with adapters (the
    inputs of norms and linears, q, k, v, the attention output, gate, up and their product; about
    8 h + 3 kv + 4 f numbers a token), for the microbatches in flight on the first stage.
    """
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    width = 2 if config.bf16 else 4
    _, kv = projection_widths(hf)["k_proj"]
    per_token = (8 * hf.hidden_size + 3 * kv + 4 * hf.intermediate_size) * width / topology.tp_size
    layers = hf.num_hidden_layers / topology.pp_size
    tokens = config.micro_batch_size * config.seq_length * topology.pp_size
    logits = config.micro_batch_size * config.seq_length * hf.vocab_size * 8 / topology.tp_size
    return {
        "weights": weights,
        "gradients": 4.0 * trainable,
        "Adam": 8.0 * trainable,
        "activations": per_token * layers * tokens + (logits if topology.is_last_stage else 0.0),
    }


def _adapter_parameters(config: Config, hf: LlamaConfig) -> dict[str, int]:
    """Adapter parameters of the whole model by kind, the frozen ones included."""
    widths = projection_widths(hf)
    return {
        name: hf.num_hidden_layers
        * sum(math.prod(config.parameter_shape(name, *widths[p])) for p in config.projections)
        for name in config.parameter_names
    }


def banner(
    model: LlamaModel, config: Config, hf: LlamaConfig, base: BaseInfo, dispatcher_name: str, topology: Topology
) -> str:
    """The text of the banner."""
    adapters = _adapter_parameters(config, hf)
    trainable = sum(number for name, number in adapters.items() if name not in config.frozen_names)
    memory = memory_estimate(model, config, hf, topology)
    mixture = f", N={config.num_experts} experts, top-{config.topk}" if config.is_mixture else ""
    shared = f", d={config.shared_dim}, r'={config.expert_rank}" if config.method == "malora" else ""
    lines = [
        f"base        {base.hf_model_name_or_path}: {base.num_parameters / 1e6:,.1f} M parameters, frozen, "
        f"{'bfloat16' if config.bf16 else 'float32'}",
        f"adapter     {config.method}: r={config.lora_rank}{shared}{mixture} on {', '.join(config.projections)}",
        f"trainable   {trainable:,} parameters ({100 * trainable / base.num_parameters:.2f}% of the base): "
        + ", ".join(
            f"{kind} {number:,}{' (frozen)' if kind in config.frozen_names else ''}"
            for kind, number in adapters.items()
        ),
        f"layout      {topology.describe()}",
        f"dispatch    {dispatcher_name if config.is_mixture else 'none (one expert)'}",
        f"attention   torch scaled_dot_product_attention; optimizer AdamW in float32; torch {torch.__version__}",
        "memory      per rank about " + ", ".join(f"{what} {_size(size)}" for what, size in memory.items()),
        *(f"warning     {text}" for text in config.adapter_warnings()),
    ]
    rule = "-" * 88
    return "\n".join((rule, *lines, rule))
