"""Where the supported versions of megatron-core differ; nothing else asks for the version.

What is not a tensor in a distributed checkpoint, megatron's "common state", lies in the file
`common.pt` up to 0.18 and in an object inside the checkpoint from 0.19 on. 0.19 reads both.
"""

from __future__ import annotations

from collections.abc import Collection
from importlib.metadata import version
from pathlib import Path

from malora_dist.errors import CheckpointError

#: Key of the object; megatron adds its place among its shards, of which there is one.
_COMMON_STATE = "common_state/shard_0_1"


def keeps_common_state_inside() -> bool:
    """Whether the installed megatron-core writes the common state into the checkpoint."""
    major, minor = version("megatron-core").split(".")[:2]
    return (int(major), int(minor)) >= (0, 19)


def check_common_state(directory: Path, objects: Collection[str]) -> None:
    """The checkpoint of `directory` has its common state, where the installed megatron-core finds it.

    Args:
        objects: the keys in the checkpoint that are not tensors.

    Raises:
        CheckpointError: it is missing, or a newer megatron-core wrote it.
    """
    if (directory / "common.pt").is_file():
        return
    if _COMMON_STATE not in objects:
        raise CheckpointError(f"{directory}: is half-written, common.pt is missing; write or copy it again")
    if not keeps_common_state_inside():
        raise CheckpointError(
            f"{directory}: was written with megatron-core 0.19 or newer, which {version('megatron-core')} cannot "
            "read; resume with the newer one"
        )
