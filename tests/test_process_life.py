"""What becomes of the processes of a run: killed ranks, lost agents, signals, hangs, machines that come and go."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch.distributed import HashStore, Store

from malora_dist.launch import final_code, signals_to_handle
from malora_dist.parallel.heartbeat import _summary
from malora_dist.parallel.rendezvous import agree_on_name
from tests.conftest import ROOT
from tests.test_multi_node import environment
from tests.test_parity import overrides
from tests.workers import WorkerPool, _free_port

TIMEOUT = 600  # a starved machine is slow, not broken


def wait_for(condition: Callable[[], bool], what: str, seconds: float = TIMEOUT) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def children(pid: int) -> list[int]:
    """Of a process, in the order of their start."""
    return sorted(int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


class Launch:
    """A launch of ranks in the background, its output in a file."""

    def __init__(self, output: Path, command: list[str], **variables: str) -> None:
        self.output = output
        with output.open("wb") as file:
            self.process = subprocess.Popen(command, env=environment(**variables), stdout=file, stderr=file)

    @property
    def text(self) -> str:
        return self.output.read_text()

    def wait_for_text(self, pattern: str, times: int = 1) -> None:
        def is_there() -> bool:
            assert self.process.poll() is None or len(re.findall(pattern, self.text)) >= times, self.text
            return len(re.findall(pattern, self.text)) >= times

        wait_for(is_there, f"{pattern!r} in {self.output}")


@pytest.fixture
def launches() -> Iterator[list[Launch]]:
    """Launches that are ended with the test, and their ranks with them."""
    started: list[Launch] = []
    yield started
    for launch in started:
        launch.process.kill()
        launch.process.wait()


# --- ranks and their agent


@pytest.mark.parametrize("is_linux", [True, False], ids=["death signal", "watch"])
def test_a_rank_ends_with_its_agent(is_linux: bool, tmp_path: Path) -> None:
    rank = "from malora_dist.parallel import process_life as p; import os, time"
    rank += f"; p._end_with_parent(os.getppid(), {is_linux})"
    rank += f"; open({str(tmp_path / 'ready')!r}, 'w'); time.sleep(60)"
    agent = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {rank!r}]); print(p.pid, flush=True)"
    started = subprocess.Popen(
        [sys.executable, "-c", f"{agent}; p.wait()"], env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert started.stdout is not None
    pid = int(started.stdout.readline())
    wait_for((tmp_path / "ready").exists, "the rank's start")
    assert is_alive(pid)
    started.kill()
    started.wait()
    wait_for(lambda: not is_alive(pid), "the rank's end", 20)


def test_a_rank_ends_that_begins_after_its_agent_has_gone(tmp_path: Path) -> None:
    """Killed while the rank is being started: no death signal comes any more."""
    rank = "import os, sys, time; time.sleep(1); from malora_dist.parallel import process_life as p; p.end_with_agent()"
    rank += f"; open({str(tmp_path / 'lives')!r}, 'w'); time.sleep(60)"
    agent = "import os, subprocess, sys; from malora_dist.parallel.process_life import AGENT_VARIABLE as name; "
    agent += "os.environ[name] = str(os.getpid()); "
    agent += f"print(subprocess.Popen([sys.executable, '-c', {rank!r}], stdout=2).pid, flush=True); os._exit(0)"
    started = subprocess.run(
        [sys.executable, "-c", agent], env=environment(TORCHELASTIC_RUN_ID="x"), capture_output=True, check=True
    )
    pid = int(started.stdout)
    wait_for(lambda: not is_alive(pid), "the rank's end", 20)
    assert not (tmp_path / "lives").exists()


def test_a_process_that_torchrun_did_not_start_outlives_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    from malora_dist.parallel import process_life

    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(process_life, "_end_with_parent", lambda **_: pytest.fail("would end with the shell"))
    process_life.end_with_agent()


# --- the start


def agree(store: Store, world_size: int, late: float = 0.0) -> list[str]:
    """What the ranks of a start agree on; the last one comes late."""
    names = [""] * world_size

    def join(rank: int) -> None:
        time.sleep(late if rank == world_size - 1 else 0.0)
        names[rank] = agree_on_name(store, rank, world_size, 30.0)

    ranks = [threading.Thread(target=join, args=(rank,)) for rank in range(world_size)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    return names


def test_every_start_has_a_name_of_its_own() -> None:
    """Although the store keeps all that earlier starts, of other sizes too, have left in it."""
    store = HashStore()
    seen = set()
    for world_size, late in ((3, 0.0), (3, 0.3), (2, 0.3), (4, 0.3), (1, 0.0)):
        names = agree(store, world_size, late)
        assert len(set(names)) == 1
        seen.add(names[0])
    assert len(seen) == 5
    with pytest.raises(TimeoutError, match="not all 2 ranks started"):
        agree_on_name(HashStore(), 0, 2, 0.2)


# --- the launch


RANK = """
import os, pathlib, signal, sys, time
me = os.environ["RANK"] + "-" + os.environ["TORCHELASTIC_RESTART_COUNT"]
def stop(number, _):
    pathlib.Path(sys.argv[1], "stopped-" + me).write_text(signal.Signals(number).name)
    time.sleep(1)
    sys.exit(128 + number)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, stop)
pathlib.Path(sys.argv[1], "rank-" + me).touch()
if sys.argv[2] != "wait" and me != "1-0":
    sys.exit(int(sys.argv[2]))
time.sleep(60)
"""


def launch_toy(tmp_path: Path, behaviour: str) -> Launch:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    options = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    command = [sys.executable, "-m", "malora_dist.launch", *options, str(script), str(tmp_path), behaviour]
    return Launch(tmp_path / "log", command)


@pytest.mark.parametrize(("code", "launch_code", "starts"), [(2, 2, 1), (143, 143, 1), (7, 1, 2)])
def test_what_cannot_go_better_is_not_restarted(code: int, launch_code: int, starts: int, tmp_path: Path) -> None:
    launch = launch_toy(tmp_path, str(code))
    assert launch.process.wait(TIMEOUT) == launch_code, launch.text
    assert len(list(tmp_path.glob("rank-0-*"))) == starts
    assert "Traceback" not in launch.text
    assert ("exitcode  : 7" in launch.text) == (code == 7)


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([2], 2),
        ([2, -15, 1], 2),  # the others failed with it, or were ended
        ([143, 143], 143),
        ([130, -9], 130),
        ([1, 143], None),  # one failed, and torchrun stopped the other
        ([140], None),  # SIGUSR2: another machine joins
        ([-9], None),
        ([], None),
    ],
)
def test_final_code(codes: list[int], expected: int | None) -> None:
    assert final_code(codes) == expected


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_reaches_the_ranks(number: signal.Signals, tmp_path: Path) -> None:
    launch = launch_toy(tmp_path, "wait")
    wait_for(lambda: len(list(tmp_path.glob("rank-*"))) == 2, "both ranks")
    launch.process.send_signal(number)
    assert launch.process.wait(TIMEOUT) == 128 + number, launch.text
    assert [file.read_text() for file in tmp_path.glob("stopped-*")] == [number.name] * 2
    assert "Traceback" not in launch.text


def test_nohup_outlives_its_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun would take SIGHUP back from nohup."""
    assert "SIGHUP" in signals_to_handle().split(",")
    monkeypatch.setattr(signal, "getsignal", {signal.SIGHUP: signal.SIG_IGN}.get)
    assert "SIGHUP" not in signals_to_handle().split(",")


# --- signals in a run


@pytest.mark.parametrize("save_interval", [0, 2])
def test_all_ranks_stop_after_the_same_step(
    save_interval: int, workers: WorkerPool, base_dir: Path, task_files: list[Path], tmp_path: Path
) -> None:
    """A signal to one of them; what is saved goes on as if nothing had been."""
    settings = overrides(base_dir, task_files, "expert_model_parallel_size=2", "train_iters=4", "eval_iters=0")
    whole = workers.run("train_with_cli", 2, overrides=settings)[0]
    saved = [*settings, f"save={tmp_path}", f"save_interval={save_interval}", "resume=auto"]
    stopped = workers.run("jobs_life:train_and_signal", 2, overrides=saved, rank=1, after=2, number=signal.SIGUSR1)
    for result in stopped:
        assert (result["code"], result["iteration"]) == (128 + signal.SIGUSR1, 2)
    output = "".join(result["output"] for result in stopped)
    assert output.count(f"saved {tmp_path / 'iter_0000002'}\nends after iteration 2: SIGUSR1\n") == 1
    assert workers.run("train_with_cli", 2, overrides=saved)[0] == whole[2:]


def test_a_second_signal_ends_at_once() -> None:
    code = """
        import os, signal, time
        from malora_dist.training import stop
        stop._TWICE_WITHIN_SECONDS = 1.0
        with stop.StopSignals() as signals:
            for _ in range(2):  # a scheduler's and torchrun's: one
                os.kill(os.getpid(), signal.SIGTERM)
            print(signals.received, flush=True)
            time.sleep(1.2)
            os.kill(os.getpid(), signal.SIGTERM)
            print("still here")
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, f"{int(signal.SIGTERM)}\n"), done.stderr


# --- whole runs


def train(launches: list[Launch], output: Path, settings: list[str], **variables: str) -> Launch:
    """launch/train.sh in the background."""
    config = output.with_suffix(".yaml")
    config.touch()
    script = str(ROOT / "launch" / "train.sh")
    launch = Launch(output, ["bash", script, str(config), *settings], GLOO_SOCKET_IFNAME="lo", **variables)
    launches.append(launch)
    return launch


def test_a_run_survives(
    launches: list[Launch], base_dir: Path, task_files: list[Path], workers: WorkerPool, tmp_path: Path
) -> None:
    """A rank is killed, later one hangs: the run goes on by itself each time. Then its agent is killed: all end."""
    settings = overrides(
        base_dir, task_files, "expert_model_parallel_size=2", "eval_iters=0", "train_iters=3000", "log_interval=1",
        f"save={tmp_path / 'save'}", "save_interval=5", "distributed_timeout_minutes=0.2",
    )  # fmt: skip
    run = train(launches, tmp_path / "log", settings, NPROC_PER_NODE="2")
    seen: set[int] = set()
    for restarts, number in ((0, signal.SIGKILL), (1, signal.SIGSTOP), (2, signal.SIGKILL)):
        run.wait_for_text("going on at iteration", restarts)
        before = len(re.findall("saved ", run.text))
        run.wait_for_text("saved ", before + 1)
        ranks = children(run.process.pid)
        assert len(ranks) == 2, "checkpoints need no processes of their own"
        assert not any(children(rank) for rank in ranks), "checkpoints need no processes of their own"
        seen |= set(ranks)
        if restarts < 2:
            os.kill(ranks[0], number)
    run.process.kill()
    wait_for(lambda: not any(is_alive(pid) for pid in seen), "the end of all ranks", 20)
    assert re.search(r"iteration \d+ has not ended after \d+ s; this rank is at", run.text)
    silent = r"no sign of life from 1 of 2 ranks, stopped or gone: rank 0, last seen in iteration \d+ at \w+\.py:\d+ "
    assert re.search(silent, run.text), run.text
    logged = dict(re.findall(r"iteration (\d+)/3000 \| lm loss (\S+)", run.text))
    expected = workers.run("train_with_cli", 2, overrides=[*settings[:-3], "exit_interval=20"])[0]
    for iteration, loss in expected:
        assert logged.get(str(iteration), f"{loss:.4f}") == f"{loss:.4f}"


def test_summary_of_a_hang() -> None:
    entries = ["7 iteration 5 at a.py:1 f", "9 iteration 5 at b.py:2 g", ""]
    assert _summary(entries, [1]) == (
        "no sign of life from 2 of 3 ranks, stopped or gone: rank 0, last seen in iteration 5 at a.py:1 f; "
        "rank 2, last seen in an unknown place, before its first step"
    )
    assert _summary([*entries[:2], entries[0]], [0, 1, 2]) == (
        "all ranks are alive but one waits for another, or a step takes long: "
        "rank 0,2 in iteration 5 at a.py:1 f; rank 1 in iteration 5 at b.py:2 g"
    )


def test_machines_come_and_go(
    launches: list[Launch], base_dir: Path, task_files: list[Path], workers: WorkerPool, tmp_path: Path
) -> None:
    """Two agents; one is killed, the other goes on alone; a new one joins; SIGTERM to both saves and ends."""
    settings = overrides(
        base_dir, task_files, "eval_iters=0", "train_iters=3000", "log_interval=1", f"save={tmp_path / 'save'}",
        "save_interval=5",
    )  # fmt: skip
    port = _free_port()

    def start(name: str) -> Launch:
        """As launch/train.sh does with NNODES=1:2 on MASTER_ADDR's machine, the first, and on another; less patient."""
        config = tmp_path / "run.yaml"
        config.touch()
        rendezvous = f"is_host={int(not launches)},read_timeout=600,last_call_timeout=5,keep_alive_interval=2"
        command = [
            sys.executable, "-m", "malora_dist.launch", "--nnodes", "1:2", "--nproc-per-node", "1",
            "--max-restarts", "3", "--rdzv-id", "malora", "--rdzv-backend", "c10d",
            "--rdzv-endpoint", f"127.0.0.1:{port}",
            "--rdzv-conf", rendezvous, "--local-addr", "127.0.0.1",
            "-m", "malora_dist.train", "--config", str(config), "resume=auto", *settings,
        ]  # fmt: skip
        launches.append(Launch(tmp_path / name, command, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"))
        return launches[-1]

    stays, goes = start("stays"), start("goes")

    def count(text: str) -> int:
        return sum(len(re.findall(text, launch.text)) for launch in launches)

    wait_for(lambda: count(r"2 x cpu \(gloo\)") == 1 and count("saved ") > 0, "a run of two")
    goes.process.kill()
    wait_for(lambda: count(r"1 x cpu \(gloo\)") == 1, "the other alone")
    comes = start("comes")
    wait_for(lambda: count(r"2 x cpu \(gloo\)") == 2, "a run of two again")
    assert count("ends after iteration .*: SIGUSR2") == 1, "the one alone has saved before it was joined"
    after = count("iteration ")
    wait_for(lambda: count("iteration ") > after, "steps of the two")
    for launch in (stays, comes):
        launch.process.terminate()
    for launch in (stays, comes):
        assert launch.process.wait(TIMEOUT) == 128 + signal.SIGTERM, launch.text
    assert count("ends after iteration .*: SIGTERM") == 1
