"""megatron's TransformerConfig of a model on a layout, and whether the layout can divide the model."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from malora_dist.config import Config
from malora_dist.errors import ConfigError
from malora_dist.families.base import DecoderConfig, Family
from malora_dist.parallel.topology import Topology


def transformer_config(family: Family, topology: Topology, config: Config) -> TransformerConfig:
    """megatron's TransformerConfig of a family's model.

    expert_model_parallel_size stays out of it: the base is dense, experts live in the adapters.

    Raises:
        ConfigError: widths or layers that the layout cannot divide, or sequences longer than the attention's window.
    """
    hf = family.hf
    _check_window(family, config)
    _check_widths(hf, config)
    _check_recompute_unit(_layers_of_stages(hf, config), config)
    is_full = config.recompute_granularity == "full"
    is_interleaved = config.virtual_pipeline_model_parallel_size > 1
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    return TransformerConfig(
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        ffn_hidden_size=hf.intermediate_size,
        num_attention_heads=hf.num_attention_heads,
        num_query_groups=hf.num_key_value_heads,
        kv_channels=hf.head_dim,
        **family.transformer_fields(),
        use_te_activation_func=True,  # megatron's word for "a module": SwiGLU in the layers' spec
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=topology.tp_size,
        pipeline_model_parallel_size=topology.pp_size,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline_model_parallel_size if is_interleaved else None,
        num_layers_in_first_pipeline_stage=config.decoder_first_pipeline_num_layers or None,
        num_layers_in_last_pipeline_stage=config.decoder_last_pipeline_num_layers or None,
        recompute_granularity=None if config.recompute_granularity == "none" else config.recompute_granularity,
        recompute_method=config.recompute_method if is_full else None,
        recompute_num_layers=config.recompute_num_layers if is_full else None,
        recompute_modules=list(config.recompute_modules),
        sequence_parallel=config.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=config.bf16,
        # Interleaved stages would mix up the shapes of activations and gradients: two messages, one peer, no tag.
        variable_seq_lengths=topology.pp_size > 1 and not is_interleaved,
        calculate_per_token_loss=True,
        use_cpu_initialization=topology.device.type == "cpu",
        perform_initialization=False,
        # Fusions that compile at run time or need NVIDIA extensions; the layers' spec has none of them.
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        batch_p2p_comm=topology.device.type == "cuda",
        cuda_graph_scope=[],
        moe_token_dispatcher_type="alltoall",  # unused, but the default forbids variable_seq_lengths
    )


def _check_window(family: Family, config: Config) -> None:
    window = family.attention_window
    if window is not None and config.seq_length > window:
        raise ConfigError(
            "seq_length",
            config.seq_length,
            f"must be at most the base's sliding_window={window}: attention here is to all tokens before",
            f"set it to {window} or less",
        )


def _check_widths(hf: DecoderConfig, config: Config) -> None:
    tp = config.tensor_model_parallel_size
    for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(hf, key) % tp:
            raise ConfigError(
                "tensor_model_parallel_size", tp, f"must divide the base's {key}={getattr(hf, key)}", "lower it"
            )


def _layers_of_stages(hf: DecoderConfig, config: Config) -> list[int]:
    """The numbers of layers that pipeline stages have: those the config gives, and the equal share of all others.

    Raises:
        ConfigError: the others cannot share what is left equally.
    """
    pp, chunks = config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size
    given = [n for n in (config.decoder_first_pipeline_num_layers, config.decoder_last_pipeline_num_layers) if n]
    other_stages = pp - len(given)
    layers_left = hf.num_hidden_layers - sum(given)
    if other_stages == 0:
        fits = layers_left == 0
    else:
        other_chunks = other_stages * chunks
        fits = layers_left >= other_chunks and layers_left % other_chunks == 0
    if not fits:
        rule = f"cannot share the base's num_hidden_layers={hf.num_hidden_layers} equally: "
        rule += f"{layers_left} are left for {other_stages} stages" if given else f"{pp} stages"
        if chunks > 1:
            rule += f" of virtual_pipeline_model_parallel_size={chunks} chunks"
        cure = "choose a divisor, or set decoder_first_pipeline_num_layers or decoder_last_pipeline_num_layers"
        raise ConfigError("pipeline_model_parallel_size", pp, rule, cure)
    return given if other_stages == 0 else [*given, layers_left // other_stages]


def _check_recompute_unit(layers_of_stages: list[int], config: Config) -> None:
    """megatron recomputes a chunk's layers in units that must come out even."""
    if config.recompute_granularity != "full" or config.recompute_method != "uniform":
        return
    unit = config.recompute_num_layers
    for layers in layers_of_stages:
        layers_of_chunk = layers // config.virtual_pipeline_model_parallel_size
        if layers_of_chunk % unit:
            rule = f"must divide the {layers_of_chunk} layers of every stage or chunk with recompute_method=uniform"
            raise ConfigError("recompute_num_layers", unit, rule, "set it to 1")
