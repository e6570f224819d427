"""megatron-core's DistributedOptimizer with torch's AdamW, on a CPU, and in the same checkpoints as the plain one.

megatron runs it on a GPU with the FusedAdam of Transformer Engine or apex. With torch's AdamW,
which it takes where neither is installed, it trains but cannot resume; on a CPU it does not start.
The subclasses here mend both, for 0.16 and 0.19 alike.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def resumable(base: Any) -> Any:
    """A DistributedOptimizer for float32 parameters that resumes from its own and from the plain optimizer's state.

    The state has the plain optimizer's form on disk: exp_avg and exp_avg_sq in the shape of their
    parameter, which any layout can load. megatron's own form keeps a second copy of the
    parameters, for those who train in bfloat16.
    """

    class ResumableDistributedOptimizer(base):
        def __init__(self, optimizer: torch.optim.Optimizer | None, *args: Any, **kwargs: Any) -> None:
            super().__init__(optimizer, *args, **kwargs)
            # AdamW makes its state in the first step; megatron reads it before that to lay out what it will load.
            if isinstance(optimizer, torch.optim.AdamW):
                for shard in (p for group in self.optimizer.param_groups for p in group["params"]):
                    self.optimizer.state[shard] = {
                        "step": torch.zeros((), device=shard.device),  # where the fused kernel reads it
                        "exp_avg": torch.zeros_like(shard, requires_grad=False),
                        "exp_avg_sq": torch.zeros_like(shard, requires_grad=False),
                    }

        @classmethod
        @torch.no_grad()
        def _build_model_and_main_param_groups(cls, *args: Any) -> Any:
            # Views of parameters that knew where they come from would tie the optimizer to the hooks of DDP
            # in a cycle through C++, which Python cannot collect: model and process groups would live for ever.
            return super()._build_model_and_main_param_groups(*args)

        def sharded_state_dict(
            self, model_state: Any, is_loading: bool = False, metadata: dict[str, Any] | None = None
        ) -> dict[str, Any]:
            metadata = {**(metadata or {}), "distrib_optim_sharding_type": "fully_reshardable"}
            own = super().sharded_state_dict(model_state, is_loading, metadata=metadata)
            groups = own["optimizer"]["param_groups"]
            state = {i: {k: v for k, v in own_i.items() if k != "param"} for i, own_i in own["param_state"].items()}
            step = torch.tensor(groups[0].get("step", 0))  # FusedAdam has none before its first
            return {"state": {**state, "common_step": step}, "param_groups": groups}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            if "state" in state_dict:  # otherwise megatron has called it with its own form
                state = dict(state_dict["state"])
                step = float(state.pop("common_step", 0))  # the plain optimizer leaves 0 out
                state_dict = {
                    "optimizer": {"param_groups": [{**group, "step": step} for group in state_dict["param_groups"]]},
                    "param_state": state,
                    "param_state_sharding_type": "fully_reshardable",
                }
            super().load_state_dict(state_dict)

        def _set_main_param_and_optimizer_states(self, model_param: Tensor, tensors: dict[str, Tensor]) -> None:
            group, place = self.model_param_group_index_map[model_param]
            shard = self.optimizer.param_groups[group]["params"][place]
            state = self.optimizer.state[shard]
            if "step" in state:  # loaded before, as one tensor for all parameters; each counts its own
                state["step"] = state["step"].to(shard.device, copy=True)
            super()._set_main_param_and_optimizer_states(model_param, {"param": shard, **state, **tensors})

    return ResumableDistributedOptimizer


def for_cpu(base: Any) -> Any:
    """A DistributedOptimizer that takes CPU tensors, for which all of megatron's groups are gloo's."""

    class CpuDistributedOptimizer(base):
        @classmethod
        def _build_model_and_main_param_groups(cls, ranges: Any, buffers: Any, groups: Any, config: Any) -> Any:
            with _named_as_cuda([parameter for group in groups for parameter in group["params"]]):
                return super()._build_model_and_main_param_groups(ranges, buffers, groups, config)

        def get_parameter_state_dp_zero(self, use_gloo_comm: bool = True, **kwargs: Any) -> Any:
            self.data_parallel_group_gloo = self.data_parallel_group
            return super().get_parameter_state_dp_zero(use_gloo_comm=True, **kwargs)

    return CpuDistributedOptimizer


@contextlib.contextmanager
def _named_as_cuda(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Inside it `parameter.type()`, by which megatron tells precisions apart, answers as it would on a GPU."""
    for parameter in parameters:
        name = parameter.type().replace("torch.", "torch.cuda.")
        vars(parameter)["type"] = lambda name=name: name
    try:
        yield
    finally:
        for parameter in parameters:
            del vars(parameter)["type"]
