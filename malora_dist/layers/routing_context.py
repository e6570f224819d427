"""What the adapted linears of one model share: the current microbatch's tokens, and routing statistics.

One object per model. megatron's linears take hidden states only, so each transformer layer sets the tokens for
its adapters while it runs, from its own argument (:class:`TokenInfo`). A layer, or a part of one, that runs again
under activation recompute sets those of its own microbatch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.profiler import record_function


@dataclass
class SiteStatistics:
    """Sums over the recorded microbatches of one adapted projection on this rank.

    Attributes:
        counts_JN: top-k slots by task and expert, float32 [num_tasks + 1, N]; row 0 is padding.
        entropy_sum: entropy of the router's distribution in nats, summed over non-padding tokens.
        aux_loss_sum: load-balancing loss, summed over microbatches.
        microbatches: how many of them were not all padding, float32 [].
    """

    counts_JN: Tensor
    entropy_sum: Tensor
    aux_loss_sum: Tensor
    microbatches: Tensor


@dataclass
class RoutingContext:
    """Shared by the adapted linears of one model.

    Attributes:
        num_tasks: tasks of the training mixture.
        token_task_BS: of the running layer; int64, 0 on padding and task index + 1 elsewhere; None: one task,
            no padding.
        recording: whether statistics are collected.
        profiling: whether a profiler runs, for which regions have names.
        statistics: by site name, in model order.
    """

    num_tasks: int = 1
    token_task_BS: Tensor | None = None
    recording: bool = False
    profiling: bool = False
    statistics: dict[str, SiteStatistics] = field(default_factory=dict)

    @contextlib.contextmanager
    def working_on(self, token_task_BS: Tensor | None) -> Iterator[None]:
        """Inside, the adapters work on these tokens."""
        before = self.token_task_BS
        self.token_task_BS = token_task_BS
        try:
            yield
        finally:
            self.token_task_BS = before

    def region(self, name: str) -> AbstractContextManager[object]:
        """What runs inside has this name in a profile; next to nothing without one, as layers ask for many."""
        return record_function(name) if self.profiling else contextlib.nullcontext()

    def local_tasks(self, num_tokens: int, shard: int, num_shards: int, device: torch.device) -> Tensor:
        """Task of each token on this rank's sequence shard, in [s, b] order. int64 [num_tokens]"""
        if self.token_task_BS is None:
            return torch.ones(num_tokens, dtype=torch.int64, device=device)
        tasks_SB = self.token_task_BS.t()
        return tasks_SB.chunk(num_shards, dim=0)[shard].reshape(-1)

    def record(self, site: str, counts_JN: Tensor, entropy: Tensor, aux_loss: Tensor) -> None:
        """Add one microbatch's sums."""
        found = self.statistics.get(site)
        if found is None:
            found = SiteStatistics(torch.zeros_like(counts_JN), *(torch.zeros_like(entropy) for _ in range(3)))
            self.statistics[site] = found
        found.counts_JN += counts_JN
        found.entropy_sum += entropy
        found.aux_loss_sum += aux_loss
        found.microbatches += 1.0 if self.token_task_BS is None else (self.token_task_BS > 0).any()
