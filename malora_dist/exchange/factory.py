"""Which dispatcher serves which linear: the config key ``dispatch`` on a layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup

from malora_dist.exchange.all_to_all import AllToAllDispatcher
from malora_dist.exchange.base import TokenDispatcher
from malora_dist.exchange.cost import AdapterShape, all_to_all_bytes, cheaper_dispatch, gather_experts_bytes
from malora_dist.exchange.fastmoe import FastMoEDispatcher
from malora_dist.exchange.gather_experts import GatheredExperts
from malora_dist.exchange.local import LocalDispatcher
from malora_dist.methods.spec import AdapterSpec


def make_dispatcher(dispatch: str, num_experts: int, ep_group: ProcessGroup, device: torch.device) -> TokenDispatcher:
    """The dispatcher of that name.

    Raises:
        BackendUnavailableError: ``fastmoe`` where fmoe cannot run.
        ValueError: no such dispatcher.
    """
    if dispatch == "fastmoe":
        return FastMoEDispatcher(num_experts, ep_group, device)
    if dispatch == "all_to_all":
        return AllToAllDispatcher(num_experts, ep_group)
    if dispatch in ("local", "gather_experts", "none"):
        return LocalDispatcher(dispatch)
    raise ValueError(f"dispatch {dispatch!r}: no such dispatcher")


@dataclass(frozen=True)
class DispatchPlan:
    """How the tokens of each linear meet their experts.

    Attributes:
        dispatchers: {megatron name of a linear: its dispatcher}.
        gathered: the full copies of the experts that come to the tokens.
        reason: why these, for the banner.
    """

    dispatchers: Mapping[str, TokenDispatcher]
    gathered: GatheredExperts
    reason: str

    def describe(self) -> str:
        """``all_to_all``, or ``gather_experts (linear_qkv, linear_proj), all_to_all (linear_fc2)``."""
        linears: dict[str, list[str]] = {}
        for linear, dispatcher in self.dispatchers.items():
            linears.setdefault(dispatcher.name, []).append(linear)
        if len(linears) == 1:
            return next(iter(linears))
        return ", ".join(f"{name} ({', '.join(of)})" for name, of in linears.items())


def plan_dispatch(
    dispatch: str,
    spec: AdapterSpec,
    linears: Mapping[str, list[AdapterShape]],
    ep_group: ProcessGroup,
    device: torch.device,
    tokens: int,
    itemsize: int,
) -> DispatchPlan:
    """The dispatchers that the config key ``dispatch`` means.

    ``auto`` is ``local`` with one expert-parallel rank, and otherwise what
    :func:`cost.cheaper_dispatch` says of the largest adapter of each linear.

    Args:
        linears: {megatron name of an adapted linear: its adapters}.
        tokens: of one data-parallel rank in one optimizer step.
        itemsize: bytes of an activation.

    Raises:
        BackendUnavailableError: ``fastmoe`` where fmoe cannot run.
    """
    ep = ep_group.size()
    names = dict.fromkeys(linears, dispatch)
    reason = "asked for"
    if not spec.is_mixture:
        names, reason = dict.fromkeys(linears, "none"), f"method={spec.method} has one expert"
    elif dispatch == "auto" and ep == 1:
        names, reason = dict.fromkeys(linears, "local"), "auto: all experts are on every rank"
    elif dispatch == "auto":
        for linear, shapes in linears.items():
            largest = max(shapes, key=lambda shape: shape.out_features)
            names[linear] = cheaper_dispatch(spec, largest, ep, tokens, itemsize)
        every = [shape for shapes in linears.values() for shape in shapes]
        moved = sum(all_to_all_bytes(spec, shape, ep, tokens, itemsize) for shape in every) / 1e6
        gathered = sum(gather_experts_bytes(spec, shape, ep) for shape in every) / 1e6
        reason = (
            "auto, by bytes sent per layer, step and rank with every row full: "
            f"the tokens to the experts (all_to_all) {moved:,.1f} MB, "
            f"the experts to the tokens (gather_experts) {gathered:,.1f} MB"
        )
    made = {name: make_dispatcher(name, spec.num_experts, ep_group, device) for name in dict.fromkeys(names.values())}
    return DispatchPlan({linear: made[name] for linear, name in names.items()}, GatheredExperts(ep_group), reason)
