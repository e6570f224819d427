"""Per-task answer loss on the validation splits, through megatron's forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from malora_dist.parallel.topology import Topology


@dataclass(frozen=True)
class TaskLosses:
    """Mean answer loss per task, of those that had an answer token, and over all answer tokens."""

    by_task: dict[str, float]
    overall: float


def mean_losses(sums: Sequence[Tensor], task_names: Sequence[str], topology: Topology) -> TaskLosses:
    """Means over the global batch from the [J, 2] sums of this rank's microbatches.

    Called by all ranks; the last stage has the sums, every rank gets the result.
    """
    total = torch.zeros(len(task_names), 2, dtype=torch.float64, device=topology.device)
    for one in sums:
        total += one.double()
    for group in (topology.dp_group, topology.pp_group):  # the earlier stages add zeros
        dist.all_reduce(total, group=group)
    by_task = {name: float(loss / tokens) for name, (loss, tokens) in zip(task_names, total, strict=True) if tokens > 0}
    return TaskLosses(by_task, overall=float(total[:, 0].sum() / total[:, 1].sum()))
