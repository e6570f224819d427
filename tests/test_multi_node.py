"""launch/train.sh and launch/train.sbatch: the commands they build, their errors, and a run between two hosts.

The hosts are two network namespaces with an address of their own each, joined by a veth pair: they
share this machine's files and host name, but packets reach the other one only through the pair.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import ROOT
from tests.test_metrics import read_events
from tests.test_parity import overrides
from tests.workers import WorkerPool

TIMEOUT = 600  # a starved machine is slow, not broken
#: Variables that the scripts read, or that a torchrun around the tests would have left.
READ = (
    "NNODES",
    "NODE_RANK",
    "NPROC_PER_NODE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "RDZV_ID",
    "MAX_RESTARTS",
    "RANK",
    "WORLD_SIZE",
)


def environment(**variables: str) -> dict[str, str]:
    """This process's environment with this Python first on PATH, and of the scripts' variables only those given."""
    kept = {name: value for name, value in os.environ.items() if name not in READ and not name.startswith("SLURM_")}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**kept, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}


def write_script(file: Path, *lines: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(("#!/usr/bin/env bash", *lines, "")))
    file.chmod(0o755)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The launch scripts in a project without .venv, with a config file that they only look for."""
    root = tmp_path / "project"
    shutil.copytree(ROOT / "launch", root / "launch")
    (root / "run.yaml").touch()
    return root


def run_script(checkout: Path, name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(checkout / "launch" / name), *arguments],
        cwd=checkout,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


# --- the commands that train.sh and train.sbatch build


@pytest.fixture
def recorded(checkout: Path) -> str:
    """A PATH whose Python prints its arguments in place of starting torchrun, and does all else as this one does."""
    tools = checkout / "bin"
    real = f'[ "$2" = malora_dist.launch ] || exec {sys.executable} "$@"'
    write_script(tools / "python3", real, 'printf "%s\\n" "$@"')
    return f"{tools}:{os.environ['PATH']}"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "--nnodes 1 --nproc-per-node 2 --standalone"),
        ({"NNODES": "1", "MASTER_ADDR": "nowhere.invalid"}, "--nnodes 1 --nproc-per-node 2 --standalone"),
        (
            {"NNODES": "1", "NODE_RANK": "0"},
            "--nnodes 1 --nproc-per-node 2 --node-rank 0 --master-addr 127.0.0.1 --master-port 29500",
        ),
        (
            {"NNODES": "3", "NODE_RANK": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "1234"},
            "--nnodes 3 --nproc-per-node 2 --node-rank 2 --master-addr node0 --master-port 1234",
        ),
        (
            {"NNODES": "2", "MASTER_ADDR": "localhost"},
            "--nnodes 2 --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint localhost:29500 --rdzv-id malora "
            "--rdzv-conf is_host=1,read_timeout=600 --local-addr localhost",
        ),
        (
            {"NNODES": "2", "MASTER_ADDR": "127.0.1.1", "MASTER_PORT": "1234", "RDZV_ID": "run7"},
            "--nnodes 2 --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint 127.0.1.1:1234 --rdzv-id run7 "
            "--rdzv-conf is_host=1,read_timeout=600 --local-addr 127.0.1.1",
        ),
        (
            {"NNODES": "2:4", "MASTER_ADDR": "localhost"},
            "--nnodes 2:4 --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint localhost:29500 --rdzv-id malora "
            "--rdzv-conf is_host=1,read_timeout=600,last_call_timeout=15 --local-addr localhost",
        ),
    ],
)
def test_torchrun_command(variables: dict[str, str], expected: str, checkout: Path, recorded: str) -> None:
    """What the variables become; overrides arrive one by one, spaces and all."""
    arguments = ["run.yaml", "lr=1e-3", "data=[{path: a b.jsonl}]"]
    done = run_script(checkout, "train.sh", *arguments, PATH=recorded, NPROC_PER_NODE="2", **variables)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "-m", "malora_dist.launch", *expected.replace("-node 2", "-node 2 --max-restarts 3", 1).split(),
        "-m", "malora_dist.train", "--config", "run.yaml", "resume=auto", "lr=1e-3", "data=[{path: a b.jsonl}]",
    ]  # fmt: skip


def test_the_environment_of_the_project_comes_first_and_each_gpu_gets_a_process(checkout: Path, recorded: str) -> None:
    """.venv is taken where it exists; torch counts the GPUs, and a machine without one gets one process."""
    python = checkout / ".venv" / "bin" / "python"
    write_script(python, 'case $2 in *device_count*) echo 4 ;; *) printf "%s\\n" "$@" ;; esac')
    done = run_script(checkout, "train.sh", "run.yaml")
    assert done.stdout.splitlines()[2:6] == ["--nnodes", "1", "--nproc-per-node", "4"]
    shutil.rmtree(checkout / ".venv")
    done = run_script(checkout, "train.sh", "run.yaml", PATH=recorded, CUDA_VISIBLE_DEVICES="")
    assert done.stdout.splitlines()[2:6] == ["--nnodes", "1", "--nproc-per-node", "1"]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (
            {"NNODES": "2"},
            "MASTER_ADDR is not set, but NNODES=2; set it to the name or address of one of the machines, ",
        ),
        ({"NODE_RANK": "1"}, "NNODES is not set, but NODE_RANK=1 is; set NNODES too, 1 for this machine alone"),
        (
            {"NODE_RANK": "1", "MASTER_ADDR": "node0"},
            "NNODES is not set, but MASTER_ADDR=node0 NODE_RANK=1 is; set NNODES too, 1 for this machine alone",
        ),
        ({"NNODES": "1:4"}, "MASTER_ADDR is not set, but NNODES=4; "),
        ({"NNODES": "0"}, "NNODES='0': must be a whole number of at least 1, or two as in 2:4; "),
        ({"NNODES": "4:2"}, "NNODES='4:2': must be a whole number of at least 1, or two as in 2:4; "),
        ({"NNODES": "1:2:3"}, "NNODES='1:2:3': must be a whole number of at least 1, or two as in 2:4; "),
        ({"NNODES": "2:"}, "NNODES='2:': must be a whole number of at least 1, or two as in 2:4; "),
        (
            {"NNODES": "1:2", "MASTER_ADDR": "node0", "NODE_RANK": "0"},
            "NODE_RANK='0': is fixed, but NNODES=1:2 lets machines come and go; leave it out",
        ),
        ({"MAX_RESTARTS": "-1"}, "MAX_RESTARTS='-1': must be a whole number; 0 switches restarts off"),
        (
            {"NNODES": "2", "MASTER_ADDR": "node0", "NODE_RANK": "2"},
            "NODE_RANK='2': must be a whole number below NNODES=2; count from 0, or leave it out",
        ),
        ({"NNODES": "2", "MASTER_ADDR": "node0", "NODE_RANK": "-1"}, "NODE_RANK='-1': must be a whole number below "),
        ({"NNODES": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "http"}, "MASTER_PORT='http': must be a port, 1 to "),
        ({"NNODES": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "70000"}, "MASTER_PORT='70000': must be a port, 1 to "),
        ({"NPROC_PER_NODE": "all"}, "NPROC_PER_NODE='all': must be a whole number of at least 1"),
        (
            {"NNODES": "2", "MASTER_ADDR": "nowhere.invalid", "NPROC_PER_NODE": "1"},
            "MASTER_ADDR='nowhere.invalid': this machine finds no way to it (",
        ),
    ],
)
def test_variables_that_cannot_work(variables: dict[str, str], expected: str, checkout: Path, recorded: str) -> None:
    done = run_script(checkout, "train.sh", "run.yaml", PATH=recorded, **variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {expected}"), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


def test_config_that_is_not_there(checkout: Path) -> None:
    done = run_script(checkout, "train.sh", "none.yaml")
    cure = "name a YAML file, for example one of configs/\n"
    assert (done.returncode, done.stderr) == (2, f"error: CONFIG='none.yaml': no such file; {cure}")
    done = run_script(checkout, "train.sh")
    assert (done.returncode, done.stderr) == (2, f"error: CONFIG is missing: {cure}")
    done = run_script(checkout, "train.sh", "--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in READ[:7])


SLURM = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "node[7-9]", "SLURM_CPUS_PER_TASK": "16"}


def test_slurm_job(checkout: Path) -> None:
    """The batch file asks Slurm for the nodes' names and starts train.sh once on each; its exit code is srun's."""
    tools = checkout / "bin"
    write_script(tools / "scontrol", '[ "$*" = "show hostnames node[7-9]" ] && printf "%s\\n" node7 node8 node9')
    names = ["NNODES", "MASTER_ADDR", "MASTER_PORT", "RDZV_ID", "SRUN_CPUS_PER_TASK"]
    shown = " ".join(f'"{name}=${name}"' for name in names)
    write_script(tools / "srun", f'printf "%s\\n" "$@" {shown} "NODE_RANK=${{NODE_RANK-unset}}"', "exit 3")
    variables = {**SLURM, "SLURM_SUBMIT_DIR": str(checkout), "NODE_RANK": "1", "PATH": f"{tools}:{os.environ['PATH']}"}
    done = run_script(checkout, "train.sbatch", "run.yaml", "lr=1e-3", **variables)
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout.splitlines() == [
        "--ntasks-per-node=1", "--kill-on-bad-exit=1", "bash", f"{checkout}/launch/train.sh", "run.yaml", "lr=1e-3",
        "NNODES=3", "MASTER_ADDR=node7", "MASTER_PORT=23456", "RDZV_ID=123456", "SRUN_CPUS_PER_TASK=16",
        "NODE_RANK=unset",
    ]  # fmt: skip


@pytest.mark.parametrize(("code", "requeued"), [(138, True), (143, True), (0, False), (2, False)])
def test_slurm_warns(code: int, requeued: bool, checkout: Path) -> None:
    """SIGUSR1 to the batch script reaches srun; only a run that it has stopped goes back into the queue."""
    tools = checkout / "bin"
    write_script(tools / "scontrol", f'[ "$1" = show ] && echo node7 || echo "$*" >> {checkout}/asked')
    wait = "for i in $(seq 600); do sleep 0.1; done"
    write_script(tools / "srun", f"trap 'sleep 0.5; exit {code}' USR1", f"touch {checkout}/ready", wait)
    variables = {**SLURM, "SLURM_SUBMIT_DIR": str(checkout), "PATH": f"{tools}:{os.environ['PATH']}"}
    command = ["bash", str(checkout / "launch" / "train.sbatch"), "run.yaml"]
    batch = subprocess.Popen(command, cwd=checkout, env=environment(**variables))
    try:
        while not (checkout / "ready").exists():
            time.sleep(0.05)
        batch.send_signal(signal.SIGUSR1)
        assert batch.wait(TIMEOUT) == code
    finally:
        batch.kill()
    asked = checkout / "asked"
    assert asked.exists() == requeued
    assert not requeued or asked.read_text() == "requeue 123456\n"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "error: not in a Slurm job; submit this file with sbatch, or use launch/train.sh\n"),
        (SLURM, "error: /elsewhere/launch/train.sh: no such file; submit from the project's root\n"),
    ],
)
def test_slurm_job_that_cannot_work(variables: dict[str, str], expected: str, checkout: Path) -> None:
    done = run_script(checkout, "train.sbatch", "run.yaml", **variables, SLURM_SUBMIT_DIR="/elsewhere")
    assert (done.returncode, done.stderr) == (2, expected)


# --- a run between two hosts


class Host(NamedTuple):
    """A network namespace, and its end of the veth pair."""

    namespace: str
    interface: str
    address: str

    def received_bytes(self) -> int:
        shown = ip("-netns", self.namespace, "-json", "-stats", "link", "show", "dev", self.interface)
        return int(json.loads(shown)[0]["stats64"]["rx"]["bytes"])


def ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
    return done.stdout


def reason_against_namespaces() -> str | None:
    """Why this machine cannot have network namespaces, if it cannot."""
    if sys.platform != "linux" or shutil.which("ip") is None:
        return "network namespaces need Linux and the command ip (iproute2)"
    probe = f"malora-{os.getpid()}-probe"
    done = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return f"no network namespaces without root ({done.stderr.strip()})"
    ip("netns", "delete", probe)
    return None


def remove(host: Host) -> None:
    """End what still runs on a host, and delete it; its end of the pair goes with it."""
    for pid in ip("netns", "pids", host.namespace).split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    ip("netns", "delete", host.namespace)


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    reason = reason_against_namespaces()
    if reason is not None:
        pytest.skip(reason)
    pid = os.getpid()
    pair = [Host(f"malora-{pid}-{i}", f"ml{pid}-{i}", f"192.168.77.{i + 1}") for i in range(2)]
    with contextlib.ExitStack() as cleanup:
        for host in pair:
            ip("netns", "add", host.namespace)
            cleanup.callback(remove, host)
        ends = [("netns", host.namespace, "type", "veth") for host in pair]
        ip("link", "add", pair[0].interface, *ends[0], "peer", "name", pair[1].interface, *ends[1][:2])
        for host in pair:
            ip("-netns", host.namespace, "address", "add", f"{host.address}/24", "dev", host.interface)
            for interface in (host.interface, "lo"):
                ip("-netns", host.namespace, "link", "set", interface, "up")
        yield pair


def launch(host: Host, arguments: list[str], output: Path, **variables: str) -> subprocess.Popen[bytes]:
    """Start train.sh on a host, its stdout and stderr in a file."""
    command = ["ip", "netns", "exec", host.namespace, "bash", str(ROOT / "launch" / "train.sh"), *arguments]
    settings = environment(**{"NNODES": "2", "NPROC_PER_NODE": "1", "GLOO_SOCKET_IFNAME": host.interface} | variables)
    with output.open("wb") as file:
        return subprocess.Popen(command, env=settings, stdout=file, stderr=file)


def run_on_both(hosts: list[Host], arguments: list[str], folder: Path, ranks: bool) -> list[str]:
    """train.sh on both hosts at once; their output. With ``ranks`` each is told its NODE_RANK."""
    outputs = [folder / f"{host.namespace}.log" for host in hosts]
    agents = []
    for rank, (host, output) in enumerate(zip(hosts, outputs, strict=True)):
        variables = {"MASTER_ADDR": hosts[0].address} | ({"NODE_RANK": str(rank)} if ranks else {})
        agents.append(launch(host, arguments, output, **variables))
    codes = [agent.wait(TIMEOUT) for agent in agents]
    texts = [output.read_text() for output in outputs]
    assert codes == [0, 0], "\n".join(texts)
    return texts


def as_float32(value: float) -> float:
    """TensorBoard's precision."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


@pytest.mark.parametrize("ranks", [False, True], ids=["c10d", "static"])
def test_two_hosts(
    ranks: bool, hosts: list[Host], workers: WorkerPool, base_dir: Path, task_files: list[Path], tmp_path: Path
) -> None:
    """EP=2 across the link gives the very losses of two processes on one host."""
    settings = overrides(
        base_dir, task_files, "expert_model_parallel_size=2", "dispatch=all_to_all", "train_iters=3",
        "log_interval=1", "eval_iters=0",
    )  # fmt: skip
    config = tmp_path / "run.yaml"
    config.write_text("lora_rank: 64\n")  # and lora_rank=4 among the settings
    before = [host.received_bytes() for host in hosts]
    texts = run_on_both(hosts, [str(config), *settings, f"tensorboard_dir={tmp_path / 'events'}"], tmp_path, ranks)
    received = [host.received_bytes() - start for host, start in zip(hosts, before, strict=True)]

    logged = {event.step: event.value for event in read_events(tmp_path / "events").Scalars("lm loss")}
    expected = workers.run("train_with_cli", 2, overrides=settings)[0]
    assert logged == {iteration: as_float32(loss) for iteration, loss in expected}
    assert len(logged) == 3
    assert sum("2 x cpu (gloo)" in text and "EP 2" in text for text in texts) == 1, "one of the two writes the log"
    # Seen: 2.5 MB each way, nearly all of it tokens on their way to experts and back.
    assert min(received) > 500_000, f"{received} bytes crossed the link: the ranks found another way"


def test_a_host_whose_network_goes_down(
    hosts: list[Host], workers: WorkerPool, base_dir: Path, task_files: list[Path], tmp_path: Path
) -> None:
    """No packet says that it is gone: the other goes on alone. When the network is back the two go on together."""
    settings = overrides(
        base_dir, task_files, "eval_iters=0", "train_iters=3000", "log_interval=1", f"save={tmp_path / 'save'}",
        "save_interval=5", "distributed_timeout_minutes=0.2",
    )  # fmt: skip
    config = tmp_path / "run.yaml"
    config.touch()
    outputs = [tmp_path / f"{host.namespace}.log" for host in hosts]

    def count(pattern: str) -> int:
        return sum(len(re.findall(pattern, output.read_text())) for output in outputs)

    def wait_for(pattern: str, times: int) -> None:
        deadline = time.monotonic() + TIMEOUT
        while count(pattern) < times:
            assert time.monotonic() < deadline, "\n".join(output.read_text() for output in outputs)
            time.sleep(0.1)

    agents = [
        launch(host, [str(config), *settings], output, NNODES="1:2", MASTER_ADDR=hosts[0].address)
        for host, output in zip(hosts, outputs, strict=True)
    ]
    wait_for(r"2 x cpu \(gloo\)", 1)
    wait_for("saved ", 1)
    ip("-netns", hosts[1].namespace, "link", "set", hosts[1].interface, "down")
    wait_for(r"1 x cpu \(gloo\)", 1)
    steps = count("iteration ")
    wait_for("iteration ", steps + 5)
    ip("-netns", hosts[1].namespace, "link", "set", hosts[1].interface, "up")
    wait_for(r"2 x cpu \(gloo\)", 2)
    steps = count("iteration ")
    wait_for("iteration ", steps + 5)
    for agent in agents:
        agent.terminate()
    assert [agent.wait(TIMEOUT) for agent in agents] == [128 + signal.SIGTERM] * 2
    logged = [
        line for output in outputs for line in re.findall(r"iteration +(\d+)/3000 \| lm loss (\S+)", output.read_text())
    ]
    expected = dict(workers.run("train_with_cli", 1, overrides=[*settings[:-3], "exit_interval=20"])[0])
    for iteration, loss in logged:
        # Of the same global batches, summed in another order where the ranks are two.
        assert float(loss) == pytest.approx(expected.get(int(iteration), float(loss)), rel=1e-3)
