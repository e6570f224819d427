"""Core attention: causal, and within documents where a row holds several.

Shape suffixes: see methods/base.py.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from malora_dist.layers.token_info import TokenInfo
from malora_dist.parallel.backends import TORCH_ATTENTION


class SdpaAttention(MegatronModule):
    """Attention by torch's scaled_dot_product_attention, on every device.

    Padding is on the right, so the causal rule alone keeps it out.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        self._softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: TokenInfo | None = None,
    ) -> Tensor:
        """query [s, b, heads, head_dim], key and value [s, b, groups, head_dim] -> [s, b, heads * head_dim].

        s is the whole sequence, also under sequence parallelism.
        """
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        mask = None if packed_seq_params is None else packed_seq_params.mask
        if mask is not None and q.is_cuda:
            # The kernels that take a mask and save memory want as many keys as queries; with
            # enable_gqa torch would hold all s * s scores of every head instead.
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        context = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, scale=self._softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return context.permute(2, 0, 1, 3).flatten(2)


class FusedAttention(MegatronModule):
    """Transformer Engine's attention, causal; rows of one document only."""

    def __init__(self, config: TransformerConfig, layer_number: int, **kwargs: Any) -> None:
        super().__init__(config=config)
        # Importable with Transformer Engine only.
        engine = importlib.import_module("megatron.core.extensions.transformer_engine")
        self.engine = engine.TEDotProductAttention(config=config, layer_number=layer_number, **kwargs)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any) -> Tensor:
        """As :meth:`SdpaAttention.forward`; no mask, the causal rule says it all."""
        return self.engine(query, key, value, None, attn_mask_type=AttnMaskType.causal)


def attention_class(chosen: str) -> type[MegatronModule]:
    """The class that calls ``chosen``, a name from ``parallel.backends.attention_choice``."""
    return SdpaAttention if chosen == TORCH_ATTENTION else FusedAttention
