"""megatron-core's parallel linears with adapters beside them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import reduce_scatter_to_sequence_parallel_region
from torch import Tensor

from malora_dist.layers.adapter import AdapterSettings
from malora_dist.layers.linear_adapters import LinearAdapters

ADAPTERS = "adapters"


def is_adapter_key(key: str) -> bool:
    """Whether a state-dict key or parameter name belongs to an adapter rather than to the base."""
    return f".{ADAPTERS}." in key


def start_from_base(model: Iterable[torch.nn.Module]) -> None:
    """Fill the adapters' parameters that start from the base weight; called once the base is loaded."""
    for chunk in model:
        for module in chunk.modules():
            if isinstance(module, AdaptedColumnParallelLinear | AdaptedRowParallelLinear):
                module.adapters.start_from_base(module.weight)


def _with_adapter_shards(linear: Any, base: dict[str, Any], prefix: str, offsets: Any, metadata: Any) -> dict[str, Any]:
    """The linear's own sharded state dict, in which megatron took the adapters for plain replicas."""
    own = {key: value for key, value in base.items() if not key.startswith(f"{prefix}{ADAPTERS}.")}
    return own | linear.adapters.sharded_state_dict(f"{prefix}{ADAPTERS}.", offsets, metadata)


class AdaptedColumnParallelLinear(ColumnParallelLinear):
    """megatron's ColumnParallelLinear plus one adapter per projection fused into it.

    A bias is added last: what a method makes of the output (DoRA's magnitude) does not apply to it.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        settings: AdapterSettings,
        linear: str,
        layer_number: int,
        widths: dict[str, tuple[int, int]],
        blocks: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(input_size, output_size, **kwargs | {"skip_bias_add": True})
        self.adapters = LinearAdapters(settings, linear, layer_number, widths, "column", blocks)

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        add = self.adapters.begin(input_, self.weight)
        with self.adapters.region("base"):
            output, bias = super().forward(input_, *args, **kwargs)
        output = add(output)
        return output if bias is None else output + bias, None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: dict | None = None) -> dict:
        base = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return _with_adapter_shards(self, base, prefix, sharded_offsets, metadata)


class AdaptedRowParallelLinear(RowParallelLinear):
    """megatron's RowParallelLinear plus one adapter; it works on the rank's own sequence shard."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        settings: AdapterSettings,
        linear: str,
        layer_number: int,
        widths: dict[str, tuple[int, int]],
        **kwargs: Any,
    ) -> None:
        super().__init__(input_size, output_size, **kwargs)
        self.adapters = LinearAdapters(settings, linear, layer_number, widths, "row", 1)

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """As RowParallelLinear.forward, which without TP returns a view that nothing may be added to in place."""
        add = self.adapters.begin(input_, self.weight)
        with self.adapters.region("base"):
            output = F.linear(input_, self.weight)
            if self.sequence_parallel:
                output = reduce_scatter_to_sequence_parallel_region(output, group=self.tp_group)
        return add(output), None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: dict | None = None) -> dict:
        base = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return _with_adapter_shards(self, base, prefix, sharded_offsets, metadata)
