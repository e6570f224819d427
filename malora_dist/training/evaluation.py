"""Per-task means over answer tokens: of the loss, and on the validation splits of what is predicted right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from malora_dist.parallel.topology import Topology


@dataclass(frozen=True)
class TaskMeans:
    """Mean per task, of those that had an answer token, and over all answer tokens."""

    by_task: dict[str, float]
    overall: float


class Validation(NamedTuple):
    """What an evaluation finds.

    Attributes:
        losses: mean answer losses.
        accuracies: shares of the answer tokens that are the most probable ones after the true tokens before them.
    """

    losses: TaskMeans
    accuracies: TaskMeans

    @property
    def scalars(self) -> dict[str, float]:
        """By tag, as logged; empty where no task has a validation split."""
        found: dict[str, float] = {}
        for tag, means in (("lm loss validation", self.losses), ("accuracy validation", self.accuracies)):
            if means.by_task:
                found |= {tag: means.overall, **{f"{tag}/{task}": mean for task, mean in means.by_task.items()}}
        return found


def task_means(sums: Sequence[Tensor], figures: int, task_names: Sequence[str], topology: Topology) -> list[TaskMeans]:
    """Means over the global batch from the [J, figures + 1] sums of this rank's microbatches, the last of them tokens.

    Called by all ranks; the last stage has the sums, every rank gets the result: one for each figure.
    """
    total = torch.zeros(len(task_names), figures + 1, dtype=torch.float64, device=topology.device)
    for one in sums:
        total += one.double()
    for group in (topology.dp_group, topology.pp_group):  # the earlier stages add zeros
        dist.all_reduce(total, group=group)
    tokens = total[:, -1]
    found = []
    for summed in total[:, :-1].unbind(1):
        by_task = {name: float(s / t) for name, s, t in zip(task_names, summed, tokens, strict=True) if t > 0}
        found.append(TaskMeans(by_task, overall=float(summed.sum() / tokens.sum())))
    return found
