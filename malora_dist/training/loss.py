"""The language-model loss on answer tokens, summed; megatron divides it by their global number.

Shape suffixes: B batch, S sequence, V vocabulary on this TP rank, J tasks.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from malora_dist.data.batches import Microbatch
from malora_dist.parallel.topology import Topology


def token_losses(logits_BSV: Tensor, labels_BS: Tensor, vocab_size: int, topology: Topology) -> Tensor:
    """Cross-entropy of each token in float32, over the true vocabulary. [B, S]

    Args:
        logits_BSV: logits of this TP rank's share of the padded vocabulary.
        vocab_size: true size; columns beyond it are padding and get no probability.
    """
    logits_BSV = logits_BSV.float()
    first = topology.tp_rank * logits_BSV.shape[-1]
    real = max(vocab_size - first, 0)
    if real < logits_BSV.shape[-1]:
        padding = torch.arange(logits_BSV.shape[-1], device=logits_BSV.device) >= real
        logits_BSV = logits_BSV.masked_fill(padding, torch.finfo(torch.float32).min)
    return vocab_parallel_cross_entropy(logits_BSV, labels_BS)


def _sum_over_answers(microbatch: Microbatch, num_tasks: int, losses_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """megatron's loss function with per-token loss: (loss sum, number of tokens, what is reported).

    Reported: [J, 2], per task the loss sum and the number of answer tokens.
    """
    mask_BS = microbatch.loss_mask_BS
    per_task = torch.zeros(num_tasks + 1, 2, dtype=torch.float32, device=losses_BS.device)
    # The task of a label is the task of its sample; padding has mask 0 and adds nothing to row 0.
    rows = torch.stack((losses_BS.detach() * mask_BS, mask_BS), dim=-1).flatten(0, 1)
    per_task.index_add_(0, microbatch.token_task_BS.flatten(), rows)
    return (losses_BS * mask_BS).sum(), mask_BS.sum().int(), per_task[1:]


def forward_step(
    data_iterator: Any, model: torch.nn.Module, *, vocab_size: int, num_tasks: int, topology: Topology
) -> Any:
    """megatron's forward_step_func: one microbatch through this stage, and the loss function."""
    microbatch: Microbatch = next(data_iterator)
    output = model(microbatch.tokens_BS, microbatch.position_ids_BS, microbatch.marks)
    if get_attr_wrapped_model(model, "post_process"):  # of several model chunks on a rank, the one with the logits
        output = token_losses(output, microbatch.labels_BS, vocab_size, topology)
    return output, partial(_sum_over_answers, microbatch, num_tasks)
