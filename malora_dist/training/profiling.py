"""A profile of some steps, on request."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from malora_dist.config import Config
from malora_dist.layers.routing_context import RoutingContext
from malora_dist.parallel.profiling import pipeline_region
from malora_dist.parallel.topology import Topology
from malora_dist.training.callbacks import Callback, Step


class Profile(Callback):
    """Writes a trace of the steps of ``profile_steps`` for each rank, ``rankR_steps_FIRST_LAST.pt.trace.json.gz``.

    A run that ends sooner writes what it has; one that fails writes nothing.
    """

    def __init__(self, config: Config, topology: Topology, context: RoutingContext) -> None:
        self._steps, self._topology, self._context = config.profile_steps, topology, context
        self._directory = Path(config.tensorboard_dir or config.save) / "profile"
        self._running = contextlib.ExitStack()
        self._profile: profile | None = None
        self._first = 0

    def before_step(self, iteration: int) -> None:
        first, last = self._steps
        if self._profile is None and first <= iteration <= last:
            activities = [ProfilerActivity.CPU]
            if self._topology.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._first, self._context.profiling = iteration, True
            self._running.enter_context(pipeline_region())
            self._profile = self._running.enter_context(profile(activities=activities))

    def after_step(self, step: Step) -> None:
        if step.iteration == self._steps[1]:
            self._write(step.iteration)

    def after_last_step(self, iteration: int) -> None:
        self._write(iteration)

    def _write(self, last: int) -> None:
        """Unless it is written; a profile that cannot be written is none, and the run goes on."""
        if self._profile is None:
            return
        self._stop()
        file = self._directory / f"rank{self._topology.rank}_steps_{self._first}_{last}.pt.trace.json.gz"
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._profile.export_chrome_trace(str(file))
        except (OSError, RuntimeError) as error:  # torch's own writer
            print(f"profile: {file}: cannot be written ({error})", file=sys.stderr, flush=True)
        self._profile = None

    def on_error(self) -> None:
        self._stop()

    def _stop(self) -> None:
        self._running.close()
        self._context.profiling = False
