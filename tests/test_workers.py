"""A worker is as light after many jobs as after the first; a user's long-lived process likewise.

What the jobs leave behind would be process groups: gloo keeps three threads and some sockets for each.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.test_parity import overrides
from tests.workers import WorkerPool

#: By turns.
SETTINGS = (
    ["expert_model_parallel_size=2"],
    ["method=lora", "tensor_model_parallel_size=2", "sequence_parallel=true"],
    ["method=dora", "pipeline_model_parallel_size=2"],
    ["method=lora", "use_distributed_optimizer=true"],
    ["method=molora", "expert_model_parallel_size=2", "dispatch=all_to_all"],
)
JOBS = 30
#: 30 jobs were seen to add 2 MiB, allocators' caches; a model left behind by each would be more.
GROWTH_MIB = 16


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads where Linux lists them")
def test_workers_do_not_grow(workers: WorkerPool, base_dir: Path, task_files: list[Path]) -> None:
    """Threads and open files are the same to the last one, memory nearly."""
    settings = overrides(base_dir, task_files, "global_batch_size=4", "target_modules=[down_proj]")

    def after(jobs: int) -> list[dict[str, int]]:
        for job in range(jobs):
            changes = SETTINGS[job % len(SETTINGS)]
            workers.run("train_and_record", 2, overrides=[*settings, *changes], steps=1)
        return workers.run("jobs_guards:resources", 2)

    few, many = after(len(SETTINGS)), after(JOBS - len(SETTINGS))
    for before, now in zip(few, many, strict=True):
        for what in ("threads", "open files"):
            assert now[what] == before[what], f"{JOBS} jobs changed a worker's {what} from {before} to {now}"
        assert now["MiB"] <= before["MiB"] + GROWTH_MIB, f"{JOBS} jobs: from {before} to {now}"
