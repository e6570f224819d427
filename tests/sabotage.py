"""Ways to be wrong about where parameters live, each of which changes numbers and raises no error.

tests/test_canaries.py applies them and asserts that the comparison with the oracle notices. Each is
a context manager that breaks the code while a job of tests/jobs.py runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist


def apply(name: str) -> contextlib.AbstractContextManager[None]:
    """The sabotage ``FUNCTION`` or ``FUNCTION ARGUMENT ...``."""
    function, *arguments = name.split()
    return globals()[function](*arguments)


@contextlib.contextmanager
def _started(change: Callable[[Any, str, torch.nn.Parameter], None]) -> Iterator[None]:
    """Call ``change(adapter, kind, parameter)`` on every parameter of every adapter when it is made."""
    from malora_dist.layers.adapter import Adapter

    start = Adapter._start

    def changed(self: Any, kind: str, *args: Any) -> torch.nn.Parameter:
        parameter = start(self, kind, *args)
        change(self, kind, parameter)
        return parameter

    with patch.object(Adapter, "_start", changed):
        yield


def flip(mark: str, style: str, kind: str) -> contextlib.AbstractContextManager[None]:
    """Drop a mark where it belongs, set it where it does not."""

    def change(adapter: Any, name: str, parameter: Any) -> None:
        if (adapter.style, name) == (style, kind):
            setattr(parameter, mark, not getattr(parameter, mark))

    return _started(change)


@contextlib.contextmanager
def _finalized(change: Callable[[torch.Tensor], object]) -> Iterator[None]:
    """Call ``change`` on the finished gradient of every expert's parameter."""
    from malora_dist.training import trainer

    finalize = trainer.finalize_model_grads

    def changed(model: Any, *args: Any, **kwargs: Any) -> None:
        finalize(model, *args, **kwargs)
        for chunk in model:
            for parameter in chunk.parameters():
                if parameter.requires_grad and not parameter.allreduce:
                    change(parameter.main_grad)

    with patch.object(trainer, "finalize_model_grads", changed):
        yield


def second_reduction() -> contextlib.AbstractContextManager[None]:
    """Expert gradients are summed over expert-data-parallel ranks once more."""
    from megatron.core import parallel_state

    return _finalized(lambda grad: dist.all_reduce(grad, group=parallel_state.get_expert_data_parallel_group()))


def expert_factor() -> contextlib.AbstractContextManager[None]:
    """Expert gradients are divided by EP, as FastMoE's own DDP would want it."""
    from megatron.core import parallel_state

    return _finalized(lambda grad: grad.div_(parallel_state.get_expert_model_parallel_world_size()))


@contextlib.contextmanager
def lost_output_gradient() -> Iterator[None]:
    """The column gather takes each TP rank's gradient for the whole instead of summing them."""
    from malora_dist.layers import crossing

    gather = crossing.gather_from_sequence_parallel_region

    def whole(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return gather(tensor, *args, **{**kwargs, "tensor_parallel_output_grad": False})

    with patch.object(crossing, "gather_from_sequence_parallel_region", whole):
        yield


@contextlib.contextmanager
def unsummed_norms() -> Iterator[None]:
    """DoRA's norms of a row-parallel weight are those of the rank's shard of the input."""
    from malora_dist.layers.crossing import Crossing

    with patch.object(Crossing, "summed_over_input", lambda self, share: share):
        yield


@contextlib.contextmanager
def stale_norms() -> Iterator[None]:
    """DoRA's norms are never computed again."""
    from malora_dist.exchange.plan import ExchangePlan

    with patch.object(ExchangePlan, "steps", property(lambda self: 0, lambda self, value: None), create=True):
        yield


@contextlib.contextmanager
def balance_after_gather() -> Iterator[None]:
    """The load-balancing loss of a column is taken after the gather, whole, on every TP rank."""
    from malora_dist.layers import linear_adapters
    from malora_dist.layers.linear_adapters import LinearAdapters

    route, attach = LinearAdapters._route, linear_adapters.attach_load_balancing

    class Alone:
        """A crossing of nothing: every rank takes its tokens for all there are."""

        size = 1

        def __init__(self, group: Any) -> None:
            self.group = group

        @staticmethod
        def summed(share: Any) -> Any:
            return share

    def late(self: Any, z: Any, logits: Any) -> Any:
        if self._style == "row" or self._crossing.size == 1:
            return route(self, z, logits)
        with patch.object(LinearAdapters, "_balanced", lambda self, carrier, routing: carrier):
            z, routings = route(self, z, logits)
        stacked = type(routings[0])(*(torch.stack(parts, dim=1) for parts in zip(*routings, strict=True)))
        context = self._settings.context
        tasks_T = context.token_task_BS.t().reshape(-1)
        with patch.object(context, "local_tasks", lambda *_: tasks_T):
            sites = [adapter.site for adapter in self._list]
            z[0] = attach(z[0], stacked, self._method, context, Alone(self._crossing.group), sites)
        return z, routings

    with patch.object(LinearAdapters, "_route", late):
        yield


@contextlib.contextmanager
def balance_scaled_by(factor: str) -> Iterator[None]:
    """The load-balancing loss counts so many times."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    set_loss_scale = MoEAuxLossAutoScaler.set_loss_scale

    def scaled(scale: Any) -> None:
        set_loss_scale(scale * float(factor))

    with patch.object(MoEAuxLossAutoScaler, "set_loss_scale", staticmethod(scaled)):
        yield
