"""megatron's model of any family: the ModuleSpec with adapters in it, pipeline stages, freezing."""

from __future__ import annotations

from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules, get_transformer_layer_offset

from malora_dist.config import Config
from malora_dist.exchange.base import Site
from malora_dist.families.base import DecoderConfig, Family, projection_widths
from malora_dist.layers.adapted_linear import AdaptedColumnParallelLinear, AdaptedRowParallelLinear, is_adapter_key
from malora_dist.layers.adapter import AdapterSettings
from malora_dist.layers.attention import SdpaAttention
from malora_dist.layers.decoder import CausalModel, DecoderLayer
from malora_dist.layers.elementwise import RMSNorm, RotaryAttention, SwiGLU
from malora_dist.methods.spec import MEGATRON_LINEARS
from malora_dist.models.transformer_config import transformer_config
from malora_dist.parallel.topology import Topology

_COLUMN = ("linear_qkv", "linear_fc1")


def adapter_sites(hf: DecoderConfig, config: Config, topology: Topology) -> dict[str, list[Site]]:
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


def _linear(name: str, hf: DecoderConfig, settings: AdapterSettings, layer_number: int) -> type | ModuleSpec:
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
    hf: DecoderConfig,
    settings: AdapterSettings,
    layer_number: int,
    attention: type[MegatronModule] = SdpaAttention,
    has_head_norms: bool = False,
) -> ModuleSpec:
    """ModuleSpec of one layer with its adapters.

    Args:
        layer_number: 0-based in the whole model.
        has_head_norms: each head of queries and keys is normed.
    """
    head_norm = RMSNorm if has_head_norms else IdentityOp
    return ModuleSpec(
        module=DecoderLayer,
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
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
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


def build_stages(
    family: Family, config: Config, settings: AdapterSettings, attention: type[MegatronModule] = SdpaAttention
) -> list[CausalModel]:
    """This rank's model chunks, base frozen, adapters at their start; base weights are not loaded yet.

    One chunk, or one per virtual pipeline stage.

    Raises:
        ConfigError: widths or layers that the layout cannot divide, or sequences longer than the attention's window.
    """
    model_config = transformer_config(family, settings.topology, config)
    num_chunks = config.virtual_pipeline_model_parallel_size
    vp_stages = [None] if num_chunks == 1 else list(range(num_chunks))
    return [_build_chunk(family, model_config, settings, config.seq_length, attention, stage) for stage in vp_stages]


def _build_chunk(
    family: Family,
    config: TransformerConfig,
    settings: AdapterSettings,
    max_sequence_length: int,
    attention: type[MegatronModule],
    vp_stage: int | None,
) -> CausalModel:
    hf, topology = family.hf, settings.topology
    last_chunk = (config.virtual_pipeline_model_parallel_size or 1) - 1
    first = get_transformer_layer_offset(config, vp_stage, topology.pp_rank)
    count = get_num_layers_to_build(config, vp_stage, topology.pp_rank)
    specs = [layer_spec(hf, settings, first + i, attention, config.qk_layernorm) for i in range(count)]
    model = CausalModel(
        config,
        TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm),
        padded_vocab_size(hf.vocab_size, topology.tp_size),
        max_sequence_length,
        pre_process=topology.is_first_stage and vp_stage in (None, 0),
        post_process=topology.is_last_stage and vp_stage in (None, last_chunk),
        share_embeddings_and_output_weights=hf.tie_word_embeddings,
        position_embedding_type="rope",
        vp_stage=vp_stage,
        inv_freq=family.rope_inv_freq(),
        true_vocab_size=hf.vocab_size,
        topology=topology,
    ).to(topology.device)
    for name, parameter in model.named_parameters():
        if not is_adapter_key(name):
            parameter.requires_grad_(False)
    return model
