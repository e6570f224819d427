"""The decoder that all families are built as: norm, layer and model on megatron-core's.

Shape suffixes: S sequence, B batch, H hidden, L positions with a loss, C marks of a position.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from malora_dist.layers.routing_context import RoutingContext
from malora_dist.parallel.topology import Topology


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm under the constructor megatron's specs call; works on sequence shards as it is."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)


class DecoderLayer(TransformerLayer):
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


class CausalModel(GPTModel):
    """megatron's GPTModel with given RoPE frequencies, the true vocabulary and a frozen base.

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
