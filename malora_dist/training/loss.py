"""The language-model loss on answer tokens, summed; megatron divides it by their global number.

Shape suffixes: B batch, S sequence, J tasks.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from malora_dist.data.batches import Microbatch


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


def forward_step(data_iterator: Any, model: torch.nn.Module, *, num_tasks: int) -> Any:
    """megatron's forward_step_func: one microbatch through this stage, and the loss function.

    The last stage is given the labels and answers each token's loss: logits in megatron's own order, [s, b, v], are
    never laid out anew, nor are their gradients.
    """
    microbatch: Microbatch = next(data_iterator)
    output = model(microbatch.tokens_BS, microbatch.position_ids_BS, microbatch.marks, labels=microbatch.labels_BS)
    return output, partial(_sum_over_answers, microbatch, num_tasks)
