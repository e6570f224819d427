"""The decoder that all families are built as: layer and model on megatron-core's.

Shape suffixes: see methods/base.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import checkpoint, vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from malora_dist.layers.routing_context import RoutingContext
from malora_dist.layers.token_info import TokenInfo
from malora_dist.parallel.topology import Topology


class DecoderLayer(TransformerLayer):
    """megatron's layer; tells the adapters which tokens it is working on."""

    recompute_mlp: bool

    def __init__(self, *args: Any, context: RoutingContext, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._routing_context = context
        # Recomputed here instead, in _forward_mlp: megatron's own would leave the adapters without their tokens.
        self._recomputes_mlp = self.recompute_mlp
        self.recompute_mlp = False

    def forward(self, *args: Any, packed_seq_params: TokenInfo | None = None, **kwargs: Any) -> Any:
        """As TransformerLayer.forward; without a TokenInfo all tokens are real and of one task."""
        token_task_BS = None if packed_seq_params is None else packed_seq_params.tasks_BS
        with self._routing_context.working_on(token_task_BS):
            return super().forward(*args, packed_seq_params=packed_seq_params, **kwargs)

    def _forward_mlp(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Norm, MLP and residual sum, with ``mlp`` in ``recompute_modules`` run again in backward.

        By then the pipeline stage has gone on to other microbatches, so the closure brings its own tokens back.
        """
        forward_mlp = super()._forward_mlp
        if not self._recomputes_mlp:
            return forward_mlp(hidden_states, *args, **kwargs)
        context = self._routing_context
        token_task_BS = context.token_task_BS

        def run(hidden_SBH: Tensor) -> Tensor:
            with context.working_on(token_task_BS):
                return forward_mlp(hidden_SBH, *args, **kwargs)

        return checkpoint(run, False, hidden_states)


class CausalModel(GPTModel):
    """megatron's GPTModel with given RoPE frequencies, the true vocabulary and a frozen base.

    The output layer works on the positions that have a loss: prompts and padding, most of a batch in
    instruction tuning, cost no logits.

    Args:
        inv_freq: rotary frequencies [head_dim / 2], float32.
        true_vocab_size: without the padding that TP needs.
        topology: of the ranks.
    """

    def __init__(self, *args: Any, inv_freq: Tensor, true_vocab_size: int, topology: Topology, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._true_vocab_size, self._topology = true_vocab_size, topology
        if self.post_process:
            # The sequence shards are gathered before the choice of positions, so not by the layer any more; the
            # gather's backward sums the gradients of the vocabulary's shards.
            assert not self.output_layer.allreduce_dgrad, "TP comes with sequence parallelism"
            self.output_layer.sequence_parallel = False
            self.output_layer.disable_grad_reduce = True
        rotary = self.rotary_pos_emb
        assert rotary.inv_freq.shape == inv_freq.shape, "head_dim disagrees with the rotary frequencies"
        rotary.inv_freq = inv_freq.to(rotary.inv_freq.device)
        if self.pre_process and self.config.recompute_granularity is not None:
            # A recomputed part whose input needs no gradient gets none at all, its adapters included.
            self.embedding.register_forward_hook(lambda _module, _args, output: _require_grad(output))

    def setup_embeddings_and_output_layer(self) -> None:
        """Tied copies on two stages need no synchronisation: both are frozen and loaded from the checkpoint."""

    def _postprocess(
        self,
        hidden_states: Tensor,
        *args: Any,
        labels: Tensor | None = None,
        packed_seq_params: TokenInfo | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As GPTModel's, of the positions with a loss: logits [1, L, v], or with ``labels`` [b, s] losses [L].

        Without ``answers_L`` these are all positions; the logits then are [b, s, v].
        """
        if self.post_process:
            answers_L = None if packed_seq_params is None else packed_seq_params.answers_L
            hidden_states = self._with_loss(hidden_states, answers_L)
            if labels is not None:
                labels = labels.t().flatten()
                labels = labels if answers_L is None else labels[answers_L]
        return super()._postprocess(hidden_states, *args, labels=labels, packed_seq_params=packed_seq_params, **kwargs)

    def _with_loss(self, hidden_SBH: Tensor, answers_L: Tensor | None) -> Tensor:
        """All positions of this rank's sequence shard -> those with a loss, of all shards. [L, 1, H]"""
        if self._topology.tp_size > 1:
            hidden_SBH = gather_from_sequence_parallel_region(
                hidden_SBH, tensor_parallel_output_grad=True, group=self._topology.tp_group
            )
        if answers_L is None:
            return hidden_SBH
        return hidden_SBH.flatten(0, 1).index_select(0, answers_L).unsqueeze(1)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Cross-entropy of each position with a loss in float32, over the true vocabulary. [L]

        In evaluation [L, 2]: with it whether the label is the most probable token, 1 or 0.

        Args:
            labels: [L].
            logits: [L, 1, v] or [s, b, v], this TP rank's share of the padded vocabulary; columns beyond
                the true one get no probability.
        """
        logits = logits.flatten(0, 1).float()
        first = self._topology.tp_rank * logits.shape[-1]
        real = max(self._true_vocab_size - first, 0)
        if real < logits.shape[-1]:
            padding = torch.arange(logits.shape[-1], device=logits.device) >= real
            logits = logits.masked_fill(padding, torch.finfo(torch.float32).min)
        right_L = None if self.training else most_probable(logits, self._topology) == labels.flatten()
        losses_L: Tensor = vocab_parallel_cross_entropy(logits, labels)  # overwrites the logits
        return losses_L if right_L is None else torch.stack((losses_L.flatten(), right_L.to(losses_L.dtype)), dim=-1)


@torch.no_grad()
def most_probable(logits: Tensor, topology: Topology) -> Tensor:
    """The token with the largest logit, of equals the first, the same on every TP rank. [L]

    Args:
        logits: [L, v], this TP rank's share of the vocabulary.
    """
    tokens_L = logits.argmax(dim=-1)
    if topology.tp_size == 1:
        return tokens_L
    best_L = logits.gather(-1, tokens_L.unsqueeze(-1)).squeeze(-1)
    best_of_all_L = best_L.clone()
    dist.all_reduce(best_of_all_L, dist.ReduceOp.MAX, group=topology.tp_group)
    beyond = topology.tp_size * logits.shape[-1]
    tokens_L = torch.where(best_L == best_of_all_L, tokens_L + topology.tp_rank * logits.shape[-1], beyond)
    dist.all_reduce(tokens_L, dist.ReduceOp.MIN, group=topology.tp_group)
    return tokens_L


def _require_grad(embedded: Tensor) -> Tensor:
    return embedded.requires_grad_() if torch.is_grad_enabled() else embedded
