"""This rank's parameters by their names in the whole model, and whether their values can be trained on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from malora_dist.errors import CheckpointError
from malora_dist.layers.adapted_linear import is_adapter_key
from malora_dist.layers.decoder import CausalModel

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")


def globally_named(model: Sequence[CausalModel]) -> dict[str, torch.nn.Parameter]:
    """The parameters of a rank's chunks; layers are counted from 0 in the whole model, not in their chunk."""
    named = {}
    for chunk in model:
        for name, parameter in chunk.named_parameters():
            if match := _LAYER.match(name):
                number = chunk.decoder.layers[int(match[1])].layer_number - 1  # megatron counts from 1
                name = f"decoder.layers.{number}.{name[match.end() :]}"
            named[name] = parameter
    return named


@torch.no_grad()
def check_finite(model: Sequence[CausalModel], base: Path, start: Path | None) -> None:
    """Refuse to train on parameters that are not finite; called by all ranks once everything is loaded.

    Args:
        base: the directory the base came from.
        start: the checkpoint that the adapters came from; None: they are at their start.

    Raises:
        CheckpointError: on every rank, naming the directory and the first such parameter of any rank.
    """
    named = globally_named(model)
    are_finite = torch.stack([parameter.isfinite().all() for parameter in named.values()]).tolist()
    own = [name for name, is_finite in zip(named, are_finite, strict=True) if not is_finite]
    of_ranks: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, own)
    found = sorted({name for names in of_ranks for name in names})
    of_base = [name for name in found if not is_adapter_key(name)]  # adapters may start from a base's norms
    if not found:
        return
    first, number = (of_base or found)[0], len(found)
    more = f" and {number - 1} more parameters hold" if number > 1 else " holds"
    where, cure = base, "convert the model again"
    if start and not of_base:
        where, cure = start, "go on from an earlier checkpoint"
    raise CheckpointError(f"{where}: {first}{more} values that are not finite (NaN or infinity); {cure}")
