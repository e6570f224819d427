"""megatron-core's checkpoint writer, in the process that saves.

megatron collects what was written in the queue of a second process, which stays, and up to 0.18 forks a third one for
every file. Killed ranks left these behind, and a fork of a process with gloo's threads may hang. Here the rank writes
its file itself.
"""

from __future__ import annotations

import queue
from functools import partial
from types import ModuleType
from typing import Any


def write_in_this_process(filesystem_async: ModuleType) -> None:
    """Replace the parts of megatron's module `filesystem_async` that start processes."""
    writer = filesystem_async.FileSystemWriterAsync
    for name in ("_get_write_results_queue", "get_write_results_queue"):  # the latter from 0.19 on
        vars(filesystem_async)[name] = lambda *_: queue.SimpleQueue()
    writer.write_preloaded_data_multiproc = staticmethod(partial(_write, writer))  # 0.19 has another, with threads


def _write(writer: Any, transforms: list[Any], use_msc: bool, rank: int, buckets: list[Any], results: Any) -> None:
    """What ``write_preloaded_data_multiproc`` does: a file per bucket; what was written, or an error, comes out."""
    written: dict[int, Any] = {}
    for number, bucket in enumerate(buckets):
        result: queue.SimpleQueue[Any] = queue.SimpleQueue()
        pending: queue.Queue[int] = queue.Queue()  # megatron's function takes one entry out when it is done
        pending.put(number)
        writer.write_preloaded_data(transforms, number, bucket, result, pending, True)
        _, written[number] = result.get()
        if isinstance(written[number], Exception):
            results.put(written[number])
            return
    results.put(written)
