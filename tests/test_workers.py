"""A worker is as light after many jobs as after the first; a user's long-lived process likewise.

What the jobs leave behind would be process groups: gloo keeps three threads for each.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.test_parity import overrides
from tests.workers import WorkerPool

JOBS = 30


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads where Linux lists them")
def test_threads_do_not_grow(workers: WorkerPool, base_dir: Path, task_files: list[Path]) -> None:
    settings = overrides(base_dir, task_files, "method=lora", "global_batch_size=2", "target_modules=[down_proj]")

    def threads_after(jobs: int) -> int:
        for job in range(jobs):
            sharded = f"use_distributed_optimizer={str(job % 2 == 0).lower()}"
            workers.run("train_and_record", 1, overrides=[*settings, sharded], steps=1)
        return int(workers.run("count_threads", 1)[0])

    few = threads_after(2)
    many = threads_after(JOBS)
    assert many == few, f"{JOBS} jobs left {many - few} threads behind in a worker that had {few}"
