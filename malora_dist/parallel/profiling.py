"""What megatron-core's schedules lack for a profile that can be read: a name for what stages send one another."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch.profiler import record_function

from malora_dist.parallel.timing import replaced


@contextlib.contextmanager
def pipeline_region() -> Iterator[None]:
    """Inside, what pipeline stages send and receive is the region ``pipeline`` of a profile."""
    communicate = vars(P2PCommunicator)["_communicate"]

    def named(*args: Any, **kwargs: Any) -> Any:
        with record_function("pipeline"):
            return communicate(*args, **kwargs)

    with replaced(P2PCommunicator, "_communicate", named):
        yield
