"""A tiny run in a launch of its own, and what can be seen of it from outside: its output, its `save`, its processes."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

import psutil
from torch import Tensor

from malora_dist.checkpoint.base import TRACKER_FILE
from malora_dist.checkpoint.convert import import_hf, read_adapter_weights
from tests.conftest import ROOT, write_llama, write_tasks

#: Marks all processes of a run.
TOKEN = "MALORA_TORTURE"
ITERATIONS = 20
EVAL_INTERVAL = 3
#: A run that prints nothing for so long hangs; a starved machine is slow, not broken.
PATIENCE_SECONDS = 300.0
#: For the kernel to take a killed process away.
ORPHAN_SECONDS = 30.0
_POLL_SECONDS = 0.005


class HangsError(Exception):
    """Nothing happens in a run any more."""


class Layout(NamedTuple):
    """Ranks, and the config keys that arrange them."""

    name: str
    ranks: int
    keys: tuple[str, ...]


_TP_2 = ("tensor_model_parallel_size=2", "sequence_parallel=true")
_EP_2 = ("expert_model_parallel_size=2",)
LAYOUTS = (
    Layout("EP2", 2, _EP_2),
    Layout("TP2", 2, _TP_2),
    Layout("PP2", 2, ("pipeline_model_parallel_size=2",)),
    Layout("EP3", 3, ("expert_model_parallel_size=3",)),
    Layout("EP2xTP2", 4, (*_EP_2, *_TP_2)),
    Layout("EP2-sharded", 2, (*_EP_2, "use_distributed_optimizer=true")),
)


class Site:
    """A folder with a tiny base, its data, and the weights that undisturbed runs end with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_llama(folder / "llama")
        import_hf(folder / "llama", folder / "base")
        tasks = ",".join(f"{{path: {file}}}" for file in write_tasks(folder / "tasks"))
        self.keys = [
            f"pretrained_checkpoint={folder / 'base'}", f"data=[{tasks}]", "device=cpu", "seq_length=48",
            "validation_samples=8", "micro_batch_size=2", "global_batch_size=12", "lr=0.01", "lr_warmup_iters=3",
            "weight_decay=0.1", "lora_dropout=0.1", "num_lora_experts=6", "topk=2", "lora_rank=4", "shared_dim=6",
            f"train_iters={ITERATIONS}", "log_interval=1", f"eval_interval={EVAL_INTERVAL}", "eval_iters=2",
        ]  # fmt: skip
        self._expected: dict[Layout, dict[str, Tensor]] = {}
        #: What a start takes, from the command to the first step; measured.
        self.start_seconds = 15.0

    def expected(self, layout: Layout) -> dict[str, Tensor]:
        """The adapter of an undisturbed run.

        Raises:
            RuntimeError: even that does not come to its end.
        """
        if layout not in self._expected:
            with Run(self, layout, (), f"undisturbed-{layout.name}", restarts=0) as run:
                began = time.monotonic()
                run.wait_for(lambda: run.steps() > 0)
                self.start_seconds = time.monotonic() - began
                if run.end() != 0:
                    raise RuntimeError(f"an undisturbed run fails:\n{run.text}")
            self._expected[layout] = read_adapter_weights(run.save).tensors
        return self._expected[layout]


class Run:
    """Of one `save`; may have several launches, one after the other. Entered, it starts; left, all of it is ended."""

    def __init__(self, site: Site, layout: Layout, keys: Sequence[str], name: str, restarts: int) -> None:
        self.site, self.layout = site, layout
        self.folder = site.folder / name
        self.folder.mkdir()
        self.save, self._log = self.folder / "save", self.folder / "log"
        self.token = uuid.uuid4().hex
        launch = ["--standalone", "--nproc-per-node", str(layout.ranks), "--max-restarts", str(restarts)]
        train = [*site.keys, *layout.keys, f"save={self.save}", "resume=auto", *keys]
        self.command = [sys.executable, "-m", "malora_dist.launch", *launch, "-m", "malora_dist.train", *train]
        #: (length of the output, iteration of the newest checkpoint) at disturbances.
        self._floors: list[tuple[int, int]] = []

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes():
            process.kill()
        self.agent.wait()
        self._copying.join(ORPHAN_SECONDS)

    def start(self) -> None:
        """Launch, as a person or a scheduler would start it again."""
        variables = {TOKEN: self.token, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        environment = os.environ | variables | {"GLOO_SOCKET_IFNAME": "lo"}
        self.agent = psutil.Popen(
            self.command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        # Through a pipe: a limit on the size of a rank's files shall not cut its output off.
        self._copying = threading.Thread(target=_copy, args=(self.agent.stdout, self._log))
        self._copying.start()

    # --- what is seen

    @property
    def text(self) -> str:
        """All output so far."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    @property
    def is_running(self) -> bool:
        """Whether the present launch has not ended."""
        return self.agent.poll() is None

    def ranks(self) -> list[psutil.Process]:
        """Of the present launch."""
        try:
            return self.agent.children()
        except psutil.NoSuchProcess:
            return []

    def processes(self) -> list[psutil.Process]:
        """All that belong to this run, whoever their parent is."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(TOKEN) == self.token and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
        return found

    def orphans(self) -> list[psutil.Process]:
        """Processes that are still there although the launch has gone, after the kernel had time."""
        deadline = time.monotonic() + ORPHAN_SECONDS
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return left

    def published(self) -> int:
        """The iteration that the tracker file names; 0: none yet."""
        file = self.save / TRACKER_FILE
        return int(file.read_text()) if file.exists() else 0

    def steps(self) -> int:
        """Log lines of steps so far."""
        return len(re.findall(r"^iteration +\d+/", self.text, re.MULTILINE))

    # --- what happens to it

    def wait_until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Whether the condition came true while the launch was running and the time not over."""
        deadline = time.monotonic() + seconds
        while self.is_running and time.monotonic() < deadline:
            if condition():
                return True
            time.sleep(_POLL_SECONDS)
        return False

    def wait_for(self, condition: Callable[[], bool]) -> bool:
        """Whether the condition came true while the launch was running.

        Raises:
            HangsError: neither it nor anything else happens.
        """
        while True:
            before = len(self.text)
            if self.wait_until(condition, PATIENCE_SECONDS) or not self.is_running:
                return self.is_running
            if len(self.text) == before:
                raise HangsError(f"nothing has happened for {PATIENCE_SECONDS:.0f} s")

    def rest(self, seconds: float) -> None:
        """Wait, or until the launch has ended."""
        self.wait_until(lambda: False, seconds)

    def end(self) -> int:
        """Wait for the exit code of the launch.

        Raises:
            HangsError: it does not end.
        """
        self.wait_for(lambda: False)
        self._copying.join(ORPHAN_SECONDS)
        return self.agent.returncode

    def disturb(self) -> None:
        """Remember what is published now: no later start may go back behind it."""
        self._floors.append((len(self.text), self.published()))

    def went_back(self) -> str:
        """Where a start was behind what had been published; empty: nowhere."""
        text = self.text
        starts = [match.start() for match in re.finditer(r"^layout  ", text, re.MULTILINE)]
        for start, following in itertools.pairwise([*starts, len(text)]):
            floor = max((iteration for at, iteration in self._floors if at <= start), default=0)
            first = re.search(r"^iteration +(\d+)/", text[start:following], re.MULTILINE)
            if first and int(first[1]) <= floor:
                return f"iteration {floor} was published, and a later start began with step {first[1]}"
        return ""


def _copy(stream: BinaryIO, file: Path) -> None:
    with file.open("ab", buffering=0) as log:
        while piece := os.read(stream.fileno(), 1 << 16):
            log.write(piece)
    stream.close()
