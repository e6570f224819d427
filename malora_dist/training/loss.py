"""The language-model loss on answer tokens, summed; megatron divides it by their global number.

Shape suffixes: see methods/base.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from malora_dist.data.batches import Microbatch
from malora_dist.layers.token_info import TokenInfo


def _sum_over_answers(microbatch: Microbatch, num_tasks: int, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """megatron's loss function with per-token loss: (loss sum, number of tokens, what is reported).

    Reported: [J, 2], per task the loss sum and the number of answer tokens; in evaluation [J, 3], between them how
    many of these are predicted right.

    Args:
        output: losses [L]; in evaluation [L, 2] with whether the prediction is right.
    """
    figures_LC = output if output.dim() == 2 else output.unsqueeze(-1)
    # The task of a label is the task of its sample.
    task_L = microbatch.token_task_BS.t().flatten()[microbatch.answers_L]
    counted = torch.cat((figures_LC.detach(), torch.ones_like(figures_LC[:, :1])), dim=-1)
    per_task = torch.zeros(num_tasks + 1, counted.shape[1], dtype=torch.float32, device=output.device)
    per_task.index_add_(0, task_L, counted)
    return figures_LC[:, 0].sum(), per_task[:, -1].sum().int(), per_task[1:]


def forward_step(data_iterator: Any, model: torch.nn.Module, *, num_tasks: int) -> Any:
    """megatron's forward_step_func: one microbatch through this stage, and the loss function.

    The last stage is given the labels and answers the losses of the positions that have one; no other
    position gets logits.
    """
    microbatch: Microbatch = next(data_iterator)
    tokens = TokenInfo(
        tasks_BS=microbatch.token_task_BS, documents_BS=microbatch.document_BS, answers_L=microbatch.answers_L
    )
    with record_function("forward"):
        output = model(
            microbatch.tokens_BS,
            microbatch.position_ids_BS,
            None,  # attention's own rule does without a mask
            labels=microbatch.labels_BS,
            packed_seq_params=tokens,
        )
    return output, partial(_sum_over_answers, microbatch, num_tasks)
