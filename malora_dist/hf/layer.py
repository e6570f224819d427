"""One adapted linear: the frozen base plus token-routed experts, by the maths of malora_dist.methods."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from malora_dist.errors import MaloraError
from malora_dist.hf.config import MaloraConfig
from malora_dist.kernels.columns import Columns
from malora_dist.kernels.experts import ExpertWeights, Tokens, add_experts
from malora_dist.kernels.project import project_and_score
from malora_dist.methods.base import METHODS
from malora_dist.methods.initial import initial_parameter
from malora_dist.methods.reference import sum_over_experts
from malora_dist.methods.routing import Routing, dense_gates, route


class RoutedTokens(NamedTuple):
    """What one adapter on one linear did with the tokens of a forward pass."""

    config: MaloraConfig
    routing: Routing
    trains_router: bool


class MaloraLayer(nn.Module, BaseTunerLayer):
    """Wraps a linear and adds the active adapters' output to it.

    Parameters lie in ParameterDicts keyed by adapter name, one per kind (``malora_S`` and so on), all experts in one
    tensor, shaped as :meth:`Method.shape`, float32 whatever the base's dtype. PEFT switches gradients on and off with
    the adapters; what is frozen for good is in ``frozen_peft_weight_names``, which it leaves alone.
    """

    adapter_layer_names: tuple[str, ...] = ()  # of each layer, one per parameter that any method declares
    other_param_names = ("adapter_configs",)

    #: Where forward notes its routings while the tuner wants the load-balancing loss. The loss itself
    #: is taken outside, where the padding mask is known, so that a recomputed forward (gradient
    #: checkpointing) repeats exactly the operations of the first.
    routing_log: list[RoutedTokens] | None = None

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapter_configs: dict[str, MaloraConfig] = {}
        declared = {name: None for method in METHODS.values() for name in method.parameters}
        self.adapter_layer_names = tuple(f"malora_{name}" for name in declared)
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []

    def update_layer(self, adapter_name: str, config: MaloraConfig, layer_number: int, projection: str) -> None:
        """Add an adapter at its start values; the tuner activates it.

        Args:
            layer_number: 0-based number of the layer in the model.
            projection: Hugging Face name of this linear, e.g. ``q_proj``.
        """
        base = self.get_base_layer()
        assert isinstance(base, nn.Linear)
        self.adapter_configs[adapter_name] = config
        method = config.declared
        method.check_widths(projection, base.in_features, base.out_features)
        for name in method.parameters:
            value = initial_parameter(
                method, name, base.in_features, base.out_features, config.seed, layer_number, projection
            )
            getattr(self, f"malora_{name}")[adapter_name] = nn.Parameter(value.to(base.weight.device))
        frozen = tuple(f"malora_{name}" for name in method.parameters if not method.is_trained(name))
        self.frozen_peft_weight_names[adapter_name] = frozen

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Base output plus the active adapters'. x [..., n] -> [..., m], in the base output's dtype."""
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        if self.base_layer._forward_hooks:  # they may keep the base's output, which adapters are added to in place
            result = result.clone()
        for adapter_name in self.active_adapters:
            if adapter_name in self.adapter_configs:
                result = self._add(adapter_name, x, result)
        return result

    def _add(self, adapter_name: str, x: Tensor, result: Tensor) -> Tensor:
        """Add one adapter's output to the base's, in place."""
        config = self.adapter_configs[adapter_name]
        method = config.declared
        params = {name: getattr(self, f"malora_{name}")[adapter_name] for name in method.parameters}
        # Autocast would also take the router to the low precision: it is off, and the experts run in the
        # dtype the base has just computed in (x's own dtype, or autocast's).
        with torch.autocast(x.device.type, enabled=False):
            z_TD, logits_TN = self._project(config, params, x.reshape(-1, x.shape[-1]), result.dtype)
            routing = route(logits_TN, config.topk, config.norm_topk_prob)
            if method.chain is not None:
                down = None if method.chain.down is None else params[method.chain.down]
                weights = ExpertWeights(down, [params[method.chain.up]], 1, method.scaling)
                tokens = Tokens(z_TD, routing.gates_TK, routing.experts_TK)
                result = add_experts("auto", result, Columns(1, 0, result.shape[-1]), tokens, weights)
            else:
                p = {name: parameter.to(z_TD.dtype) for name, parameter in params.items()}
                gates_TN = dense_gates(routing.gates_TK, routing.experts_TK, method.num_experts)
                v = sum_over_experts(method, p, z_TD, gates_TN)
                result = result + (method.combine(p, v) * method.scaling).view_as(result)
        if self.routing_log is not None:
            self.routing_log.append(RoutedTokens(config, routing, params["router"].requires_grad))
        return result

    def _project(
        self, config: MaloraConfig, params: dict[str, Tensor], x_TI: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """z of x after dropout, in `dtype`, and the router's logits of x itself; one read where both are the same."""
        drops = self.training and config.lora_dropout > 0
        dropped_x_TI = (F.dropout(x_TI, config.lora_dropout) if drops else x_TI).to(dtype)
        chain = config.declared.chain
        if chain is not None and chain.project is not None and dropped_x_TI is x_TI:
            return project_and_score(x_TI, params[chain.project], params["router"])
        _, logits_TN = project_and_score(x_TI, x_TI.new_empty(0, x_TI.shape[1]), params["router"])
        return config.declared.project(config.declared.before_dispatch(params, dtype), dropped_x_TI), logits_TN

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused.

        Raises:
            MaloraError: always.
        """
        raise unmergeable()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """PEFT's hook, without its cast to the base's dtype: float32 adapters would lose bits on a bf16 base."""
        target = device if device is not None else self.get_base_layer().weight.device
        for name in self.adapter_layer_names:
            parameters = getattr(self, name)
            if adapter_name in parameters and not parameters[adapter_name].is_meta:
                parameters[adapter_name].data = parameters[adapter_name].data.to(target)

    def __repr__(self) -> str:
        return "malora." + super().__repr__()


def unmergeable() -> MaloraError:
    """The answer to every way of asking for a merge."""
    return MaloraError(
        "merge: a token-routed adapter has no static merged weight, every token takes its own experts; "
        "keep the adapter beside the base, unload() it, or train method=lora for a mergeable one"
    )
