"""Llama on megatron-core: configuration, the ModuleSpec with adapters in it, freezing."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import Tensor
from transformers import LlamaConfig

from malora_dist.config import Config
from malora_dist.errors import ConfigError
from malora_dist.exchange.base import Site
from malora_dist.families.hf_config import rope_inv_freq
from malora_dist.layers.adapted_linear import AdaptedColumnParallelLinear, AdaptedRowParallelLinear, is_adapter_key
from malora_dist.layers.adapter import AdapterSettings
from malora_dist.layers.attention import SdpaAttention
from malora_dist.layers.elementwise import RotaryAttention, SwiGLU
from malora_dist.layers.routing_context import RoutingContext
from malora_dist.methods.spec import MEGATRON_LINEARS
from malora_dist.parallel.topology import Topology


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm under the constructor megatron's specs call; works on sequence shards as it is."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)


class LlamaLayer(TransformerLayer):
    """megatron's layer; tells the adapters which tokens it is working on.

    ``attention_mask`` is the only per-microbatch tensor megatron hands to every layer of every
    pipeline stage and keeps for activation recompute, and causal attention needs none: it
    carries ``Microbatch.marks``, int64 [1 or 2, b, s] (see routing_context.py).
    """

    def __init__(self, *args: Any, context: RoutingContext, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._routing_context = context

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        marks_CBS = kwargs.get("attention_mask")
        self._routing_context.token_task_BS = None if marks_CBS is None else marks_CBS[0]
        return super().forward(*args, **kwargs)


class LlamaModel(GPTModel):
    """megatron's GPTModel with Llama's RoPE frequencies, its true vocabulary and a frozen base.

    The output layer works on the positions that have a loss: prompts and padding, most of a batch in
    instruction tuning, cost no logits. Shape suffix: L positions with a loss.

    Args:
        inv_freq: rotary frequencies [head_dim / 2], float32.
        true_vocab_size: without the padding that TP needs.
        topology: of the ranks.
    """

    _answers_L: Tensor | None = None

    def __init__(self, *args: Any, inv_freq: Tensor, true_vocab_size: int, topology: Topology, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._true_vocab_size, self._topology = true_vocab_size, topology
        if self.post_process:
            # The sequence shards are gathered before the choice of positions, so not by the layer any more; the
            # gather's backward sums the gradients of the vocabulary's shards.
            assert not self.output_layer.allreduce_dgrad, "TP comes with sequence parallelism"
            self.output_layer.sequence_parallel = False
            self.output_layer.disable_grad_reduce = True
            self.output_layer.register_forward_pre_hook(lambda _layer, args: (self._with_loss(*args),))
        rotary = self.rotary_pos_emb
        assert rotary.inv_freq.shape == inv_freq.shape, "head_dim disagrees with the rotary frequencies"
        rotary.inv_freq = inv_freq.to(rotary.inv_freq.device)
        if self.pre_process and self.config.recompute_granularity is not None:
            # A recomputed part whose input needs no gradient gets none at all, its adapters included.
            self.embedding.register_forward_hook(lambda _module, _args, output: _require_grad(output))

    def setup_embeddings_and_output_layer(self) -> None:
        """Tied copies on two stages need no synchronisation: both are frozen and loaded from the checkpoint."""

    def forward(self, *args: Any, answers_L: Tensor | None = None, **kwargs: Any) -> Tensor:
        """As GPTModel.forward: hidden states, logits, or with ``labels`` losses [L].

        Args:
            answers_L: ``Microbatch.answers_L``, the positions with a loss; None: all positions.
        """
        self._answers_L = answers_L
        return super().forward(*args, **kwargs)

    def _with_loss(self, hidden_SBH: Tensor) -> Tensor:
        """All positions of this rank's sequence shard -> those with a loss, of all shards. [L, 1, H]"""
        if self._topology.tp_size > 1:
            hidden_SBH = gather_from_sequence_parallel_region(
                hidden_SBH, tensor_parallel_output_grad=True, group=self._topology.tp_group
            )
        if self._answers_L is None:
            return hidden_SBH
        return hidden_SBH.flatten(0, 1).index_select(0, self._answers_L).unsqueeze(1)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Cross-entropy of each position with a loss in float32, over the true vocabulary. [L]

        Args:
            labels: [b, s].
            logits: [L, 1, v], this TP rank's share of the padded vocabulary; columns beyond the true
                one get no probability.
        """
        labels_L = labels.t().flatten()
        if self._answers_L is not None:
            labels_L = labels_L[self._answers_L]
        logits = logits.flatten(0, 1).float()
        first = self._topology.tp_rank * logits.shape[-1]
        real = max(self._true_vocab_size - first, 0)
        if real < logits.shape[-1]:
            padding = torch.arange(logits.shape[-1], device=logits.device) >= real
            logits = logits.masked_fill(padding, torch.finfo(torch.float32).min)
        losses_L: Tensor = vocab_parallel_cross_entropy(logits, labels_L)
        return losses_L


def _require_grad(embedded: Tensor) -> Tensor:
    return embedded.requires_grad_() if torch.is_grad_enabled() else embedded


def _check_divisible(hf: LlamaConfig, config: Config) -> None:
    """The base's widths and layers fit the layout."""
    tp, pp = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(hf, key) % tp:
            raise ConfigError(
                "tensor_model_parallel_size", tp, f"must divide the base's {key}={getattr(hf, key)}", "lower it"
            )
    ends = [n for n in (config.decoder_first_pipeline_num_layers, config.decoder_last_pipeline_num_layers) if n]
    stages, layers = pp - len(ends), hf.num_hidden_layers - sum(ends)
    chunks = stages * config.virtual_pipeline_model_parallel_size
    if (layers % chunks or layers < chunks) if stages else layers:
        rule = f"cannot share the base's num_hidden_layers={hf.num_hidden_layers} equally: "
        rule += f"{layers} are left for {stages} stages" if ends else f"{pp} stages"
        if config.virtual_pipeline_model_parallel_size > 1:
            rule += f" of virtual_pipeline_model_parallel_size={config.virtual_pipeline_model_parallel_size} chunks"
        cure = "choose a divisor, or set decoder_first_pipeline_num_layers or decoder_last_pipeline_num_layers"
        raise ConfigError("pipeline_model_parallel_size", pp, rule, cure)
    per_chunk = {
        n // config.virtual_pipeline_model_parallel_size for n in [*ends, *([layers // stages] if stages else [])]
    }
    unit = config.recompute_num_layers
    if config.recompute_granularity == "full" and config.recompute_method == "uniform":
        for count in per_chunk:
            if count % unit:
                rule = f"must divide the {count} layers of every stage or chunk with recompute_method=uniform"
                raise ConfigError("recompute_num_layers", unit, rule, "set it to 1")


def transformer_config(hf: LlamaConfig, topology: Topology, config: Config) -> TransformerConfig:
    """megatron's TransformerConfig of a Llama.

    expert_model_parallel_size stays out of it: the base is dense, experts live in the adapters.

    Raises:
        ConfigError: widths or layers that the layout cannot divide.
    """
    _check_divisible(hf, config)
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
        layernorm_epsilon=hf.rms_norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        use_te_activation_func=True,  # megatron's word for "a module": SwiGLU in the spec below
        add_bias_linear=False,
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
        # Fusions that compile at run time or need NVIDIA extensions; the spec below has none of them.
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


def projection_widths(hf: LlamaConfig) -> dict[str, tuple[int, int]]:
    """Full (in_features, out_features) of the seven projections of a layer."""
    assert hf.head_dim is not None, "transformers fills it in"
    assert hf.num_key_value_heads is not None, "transformers fills it in"
    h, f = hf.hidden_size, hf.intermediate_size
    q, kv = hf.num_attention_heads * hf.head_dim, hf.num_key_value_heads * hf.head_dim
    return {
        "q_proj": (h, q), "k_proj": (h, kv), "v_proj": (h, kv), "o_proj": (q, h),
        "gate_proj": (h, f), "up_proj": (h, f), "down_proj": (f, h),
    }  # fmt: skip


_COLUMN = ("linear_qkv", "linear_fc1")


def adapter_sites(hf: LlamaConfig, config: Config, topology: Topology) -> dict[str, list[Site]]:
    """The adapters of one layer by megatron's name of their linear, what the choice of an exchange asks for."""
    widths = projection_widths(hf)
    tokens = max(1, config.global_batch_size * config.seq_length // topology.dp_size)
    sites: dict[str, list[Site]] = {}
    for _, projections in config.adapters:
        linear = next(linear for linear, fused in MEGATRON_LINEARS.items() if projections[0] in fused)
        site = Site(
            method=config.declared,
            in_features=widths[projections[0]][0],
            out_features=sum(widths[projection][1] for projection in projections),
            style="column" if linear in _COLUMN else "row",
            tensor_parallel=topology.tp_size,
            expert_parallel=topology.ep_size,
            tokens=tokens,
            itemsize=2 if config.bf16 else 4,
        )
        sites.setdefault(linear, []).append(site)
    return sites


def _linear(name: str, hf: LlamaConfig, settings: AdapterSettings, layer_number: int) -> type | ModuleSpec:
    """The class or spec of one of megatron's four linears of a layer."""
    column = name in _COLUMN
    if not set(MEGATRON_LINEARS[name]) & set(settings.spec.projections):
        return ColumnParallelLinear if column else RowParallelLinear
    widths = projection_widths(hf)
    params: dict[str, Any] = {
        "settings": settings,
        "linear": name,
        "layer_number": layer_number,
        "widths": {projection: widths[projection] for projection in MEGATRON_LINEARS[name]},
    }
    if not column:
        return ModuleSpec(module=AdaptedRowParallelLinear, params=params)
    blocks = hf.num_key_value_heads if name == "linear_qkv" else 1
    return ModuleSpec(module=AdaptedColumnParallelLinear, params={**params, "blocks": blocks})


def layer_spec(
    hf: LlamaConfig, settings: AdapterSettings, layer_number: int, attention: type[MegatronModule] = SdpaAttention
) -> ModuleSpec:
    """ModuleSpec of one layer with its adapters; ``layer_number`` is 0-based in the whole model."""
    return ModuleSpec(
        module=LlamaLayer,
        params={"context": settings.context},
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=RotaryAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=_linear("linear_qkv", hf, settings, layer_number),
                    core_attention=attention,
                    linear_proj=_linear("linear_proj", hf, settings, layer_number),
                    q_layernorm=IdentityOp,
                    k_layernorm=IdentityOp,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=_linear("linear_fc1", hf, settings, layer_number),
                    linear_fc2=_linear("linear_fc2", hf, settings, layer_number),
                    activation_func=SwiGLU,
                ),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """Vocabulary rounded up so that every TP rank gets the same number of rows."""
    return -(-vocab_size // tp_size) * tp_size


def build_llama(
    hf: LlamaConfig,
    config: TransformerConfig,
    settings: AdapterSettings,
    max_sequence_length: int,
    attention: type[MegatronModule] = SdpaAttention,
) -> list[LlamaModel]:
    """This rank's model chunks, base frozen, adapters at their start; base weights are not loaded yet.

    One chunk, or one per virtual pipeline stage.
    """
    stages = range(config.virtual_pipeline_model_parallel_size or 1)
    build = partial(_build_chunk, hf, config, settings, max_sequence_length, attention)
    return [build(None)] if len(stages) == 1 else [build(stage) for stage in stages]


def _build_chunk(
    hf: LlamaConfig,
    config: TransformerConfig,
    settings: AdapterSettings,
    max_sequence_length: int,
    attention: type[MegatronModule],
    vp_stage: int | None,
) -> LlamaModel:
    topology = settings.topology
    last_chunk = (config.virtual_pipeline_model_parallel_size or 1) - 1
    first = get_transformer_layer_offset(config, vp_stage, topology.pp_rank)
    count = get_num_layers_to_build(config, vp_stage, topology.pp_rank)
    specs = [layer_spec(hf, settings, first + i, attention) for i in range(count)]
    model = LlamaModel(
        config,
        TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm),
        padded_vocab_size(hf.vocab_size, topology.tp_size),
        max_sequence_length,
        pre_process=topology.is_first_stage and vp_stage in (None, 0),
        post_process=topology.is_last_stage and vp_stage in (None, last_chunk),
        share_embeddings_and_output_weights=hf.tie_word_embeddings,
        position_embedding_type="rope",
        vp_stage=vp_stage,
        inv_freq=rope_inv_freq(hf),
        true_vocab_size=hf.vocab_size,
        topology=topology,
    ).to(topology.device)
    for name, parameter in model.named_parameters():
        if not is_adapter_key(name):
            parameter.requires_grad_(False)
    return model
