"""What crosses tensor parallelism for an adapter, with its gradients.

A column-parallel linear meets the sequence in shards and makes a shard of the output for all tokens; a row-parallel
one meets a shard of the features of all tokens and makes whole outputs for a shard of the sequence. Each function
brings something from where x lies to where the outputs are made. Shape suffixes: see methods/base.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    all_to_all_hp2sp,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.distributed import ProcessGroup

from malora_dist.methods.base import Style


@dataclass(frozen=True)
class Crossing:
    """The crossings of one linear; without tensor parallelism each returns what it is given."""

    style: Style
    group: ProcessGroup

    @property
    def size(self) -> int:
        """TP."""
        return self.group.size()

    def projected(self, local: Tensor) -> Tensor:
        """Of products with x. Column: gather the sequence shards. Row: sum the partial products, keep the own shard.

        The row's input must be contiguous: megatron's reduction leaves other tensors unreduced.
        """
        if self.size == 1:
            return local
        if self.style == "column":
            return gather_from_sequence_parallel_region(local, tensor_parallel_output_grad=True, group=self.group)
        return reduce_scatter_to_sequence_parallel_region(local.contiguous(), group=self.group)

    def unprojected(self, x_TI: Tensor) -> Tensor:
        """Of x itself, which then crosses TP in its whole width. Row: from shards of features to shards of tokens."""
        if self.size == 1 or self.style == "column":
            return self.projected(x_TI)
        return all_to_all_hp2sp(x_TI.contiguous(), group=self.group)

    def whole_input(self, weight: Tensor, axis: int) -> Tensor:
        """An expert's parameter with the whole of an axis that row parallelism shards: there tokens come whole."""
        if self.size == 1:
            return weight
        first = weight.movedim(axis, 0).contiguous()
        whole = gather_from_sequence_parallel_region(first, tensor_parallel_output_grad=True, group=self.group)
        return whole.movedim(0, axis)

    def summed(self, share: Tensor) -> Tensor:
        """The sum over all ranks of a statistic of their own tokens, whose gradient stays with them."""
        return share if self.size == 1 else reduce_from_tensor_model_parallel_region(share, group=self.group)

    @torch.no_grad()
    def summed_over_input(self, share: Tensor) -> Tensor:
        """The sum over shards of the input, without a gradient; of a column each rank has the whole input."""
        if self.size > 1 and self.style == "row":
            dist.all_reduce(share, group=self.group)
        return share
