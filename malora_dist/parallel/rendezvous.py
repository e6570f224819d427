"""How the ranks of one start of a run find each other, and none of an earlier start.

torchrun keeps one store for all restarts of a run, and in it nothing tells one start from another (seen with torch
2.13). What the last start left there is in the way: a rank that is first reads the address of a dead process and cannot
connect. So the ranks agree on a name that is new every time, and keep everything under it.
"""

from __future__ import annotations

import datetime
import json
import time
import uuid

import torch.distributed as dist
from torch.distributed import PrefixStore, Store

_POLL_SECONDS = 0.05
#: Of a start: processes on a busy machine may begin minutes apart.
START_SECONDS = 600.0


def meet() -> tuple[Store, int, int]:
    """Join the other ranks that torchrun started together with this one.

    Returns:
        a store that these ranks have to themselves, this one's rank, and the world size.

    Raises:
        TimeoutError: not all ranks came.
    """
    store, rank, world_size = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=START_SECONDS)))
    return PrefixStore(f"start/{agree_on_name(store, rank, world_size, START_SECONDS)}", store), rank, world_size


def agree_on_name(store: Store, rank: int, world_size: int, seconds: float) -> str:
    """A name of this start, the same on all its ranks, whatever earlier ones left in the store.

    Every rank writes a token of its own. Rank 0 offers a name for the tokens it finds and takes it back when one
    changes, for that was an earlier start's; it holds when each rank has found its own token in the offer.
    """
    own, deadline = uuid.uuid4().hex, time.monotonic() + seconds
    store.set(f"token/{rank}", own)
    name, tokens = "", [""]
    while True:
        if rank == 0:
            found = [_read(store, f"token/{other}") for other in range(world_size)]
            if found != tokens:
                name, tokens = uuid.uuid4().hex, found
                store.set("offer", json.dumps([name, tokens]))
            if all(store.check([f"{name}/seen/{other}"]) for other in range(1, world_size)):
                store.set(f"{name}/holds", "")
                return name
        else:
            name, tokens = json.loads(_read(store, "offer") or '["", []]')
            if len(tokens) == world_size and tokens[rank] == own:
                store.set(f"{name}/seen/{rank}", "")
                if store.check([f"{name}/holds"]):
                    return str(name)
        if time.monotonic() > deadline:
            raise TimeoutError(f"rank {rank}: not all {world_size} ranks started within {seconds:g} s")
        time.sleep(_POLL_SECONDS)


def _read(store: Store, key: str) -> str:
    """A value, or nothing if there is none yet."""
    return store.get(key).decode() if store.check([key]) else ""
