"""The dispatcher for a config key and a layout."""

from __future__ import annotations

import torch
from torch.distributed import ProcessGroup

from malora_dist.dispatch.all_to_all import AllToAllDispatcher
from malora_dist.dispatch.base import TokenDispatcher
from malora_dist.dispatch.fastmoe import FastMoEDispatcher
from malora_dist.dispatch.local import LocalDispatcher


def make_dispatcher(dispatch: str, num_experts: int, ep_group: ProcessGroup, device: torch.device) -> TokenDispatcher:
    """The dispatcher that the config key ``dispatch`` names.

    ``auto`` is ``local`` with one expert-parallel rank and ``all_to_all`` otherwise.

    Raises:
        BackendUnavailableError: ``fastmoe`` where fmoe cannot run.
    """
    if dispatch == "auto":
        dispatch = "local" if ep_group.size() == 1 else "all_to_all"
    if dispatch == "fastmoe":
        return FastMoEDispatcher(num_experts, ep_group, device)
    if dispatch == "all_to_all":
        return AllToAllDispatcher(num_experts, ep_group)
    return LocalDispatcher()
