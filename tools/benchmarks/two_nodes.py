"""Step time of the same training by dispatch mode, on two hosts joined by a slow link.

    sudo python tools/benchmarks/two_nodes.py

The hosts are two network namespaces of this machine with a process each (DP=2, EP=2), joined by a veth pair whose ends
tc holds to 100 Mbit/s and then 1 Gbit/s. Needs Linux, root, and ip and tc (iproute2). On each link the same processes
train one model per mode, steps interleaved:

- molora_all_to_all: x travels to its experts, as in MoLoRA on FastMoE (which sends a row per token and expert; here it
  is one per token and rank)
- malora_all_to_all: S_A x travels, shared_dim wide; the way back is as wide as before
- molora_gather_experts, malora_gather_experts: the experts travel, once a step
- malora_auto: what the rule of malora_dist/exchange/plan.py picks for each linear

A step's time is the slower process's. Bytes of a step: `ep`, what a process hands to collectives of the
expert-parallel group (malora/bytes/ep in the logs; what stays at home counts too), and `wire`, what leaves its network
interface, headers and everything else included. The floor is `wire` at the speed that gloo is seen to reach on the
idle link: what is above it is computing, and waiting for the link's latency.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from common import headline, interleaved, print_table, ratios, summary, write_results
from models import Inputs, build_trainer, llama_like, write_inputs

from malora_dist.parallel import topology as layout

MODES = {
    f"{method}_{dispatch}": (f"method={method}", f"dispatch={dispatch}")
    for method, dispatch in (
        ("molora", "all_to_all"), ("malora", "all_to_all"), ("molora", "gather_experts"),
        ("malora", "gather_experts"), ("malora", "auto"),
    )
}  # fmt: skip
BASELINE = "molora_all_to_all"
#: {name: rate as tc writes it}
LINKS = {"100Mbit": "100mbit", "1Gbit": "1gbit"}
PROCESSES = 2


class NetworkError(RuntimeError):
    """This machine cannot have the two hosts."""


class Host(NamedTuple):
    """A network namespace and its end of the veth pair."""

    namespace: str
    interface: str
    address: str


def run(*command: str) -> str:
    """Its output.

    Raises:
        NetworkError: it failed, or it is not there.
    """
    if shutil.which(command[0]) is None:
        raise NetworkError(f"there is no command {command[0]}; install iproute2")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NetworkError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def remove(host: Host) -> None:
    """End what still runs on a host and delete it; the pair goes with it."""
    for pid in run("ip", "netns", "pids", host.namespace).split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    run("ip", "netns", "delete", host.namespace)


@contextlib.contextmanager
def two_hosts(rate: str) -> Iterator[list[Host]]:
    """Two hosts joined by a link of this rate in each direction; removed at the end, whatever happens.

    Raises:
        NetworkError: no root, or no ip or tc.
    """
    if os.geteuid() != 0:
        raise NetworkError("network namespaces need root; run this script with sudo")
    pid = os.getpid()
    pair = [Host(f"malora-{pid}-{i}", f"ml{pid}-{i}", f"192.168.77.{i + 1}") for i in range(2)]
    with contextlib.ExitStack() as cleanup:
        for host in pair:
            run("ip", "netns", "add", host.namespace)
            cleanup.callback(remove, host)
        (here, there) = pair
        peer = ("peer", "name", there.interface, "netns", there.namespace)
        run("ip", "link", "add", here.interface, "netns", here.namespace, "type", "veth", *peer)
        for host in pair:
            run("ip", "-netns", host.namespace, "address", "add", f"{host.address}/24", "dev", host.interface)
            for interface in (host.interface, "lo"):
                run("ip", "-netns", host.namespace, "link", "set", interface, "up")
            shape = ("root", "tbf", "rate", rate, "burst", "128kb", "latency", "50ms")
            run("tc", "-netns", host.namespace, "qdisc", "add", "dev", host.interface, *shape)
        yield pair


def train_on(hosts: Sequence[Host], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """:func:`work` on every host at once; the results by rank.

    Raises:
        RuntimeError: it failed on a host; what it wrote to stderr is on the screen.
    """
    processes = []
    for rank, host in enumerate(hosts):
        command = ["ip", "netns", "exec", host.namespace, sys.executable, __file__, "--worker", json.dumps(settings)]
        rendezvous = {
            "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(PROCESSES), "MASTER_ADDR": hosts[0].address,
            "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": host.interface, "OMP_NUM_THREADS": str(settings["threads"]),
        }  # fmt: skip
        processes.append(subprocess.Popen(command, env=os.environ | rendezvous, stdout=subprocess.PIPE, text=True))
    while any(process.poll() is None for process in processes) and not any(p.returncode for p in processes):
        time.sleep(0.2)
    if any(process.returncode != 0 for process in processes):  # the other would wait for the failed one
        raise RuntimeError("a training process failed; its error stands above")
    return [json.loads(process.communicate()[0].splitlines()[-1]) for process in processes]


def sent_bytes() -> int:
    """By this host's interface so far."""
    interface = os.environ["GLOO_SOCKET_IFNAME"]
    return int(Path(f"/sys/class/net/{interface}/statistics/tx_bytes").read_text())


def link_speed() -> float:
    """Bytes per second of a long message from rank 0 to rank 1, gloo's handling of it included."""
    seconds = 0.0
    for size in (1 << 16, 1 << 23):  # the first opens the connection
        message = torch.zeros(size, dtype=torch.uint8)
        dist.barrier()
        started = time.perf_counter()
        dist.broadcast(message, src=0)
        dist.barrier()
        seconds = time.perf_counter() - started
    return message.numel() / seconds


def work(settings: dict[str, Any]) -> dict[str, Any]:
    """One process's part: all modes on one link.

    Returns:
        Bytes per second of the link, and per mode the seconds of each step, the bytes of a step and what dispatches.
    """
    torch.set_num_threads(settings["threads"])
    directory = Path(settings["directory"])
    inputs = Inputs(directory / "hf", directory / "base", directory / "task.jsonl", settings["tokens"], torch.float32)
    layout_keys = (f"expert_model_parallel_size={PROCESSES}", f"num_lora_experts={settings['experts']}", "device=cpu")
    trainers: dict[str, Any] = {}
    for mode, keys in MODES.items():
        first = next(iter(trainers.values()), None)
        overrides = inputs.overrides(*layout_keys, *keys, global_batch_size=PROCESSES)
        trainers[mode] = build_trainer(overrides, first and first.topology)

    def recorded_step(mode: str) -> dict[str, Any]:
        """Warms up, and counts."""
        trainer = trainers[mode]
        dist.barrier()
        before = sent_bytes()
        trainer.train_step(record=True)
        dist.barrier()
        wire = sent_bytes() - before
        return {"ep_bytes": trainer.traffic.bytes["ep"], "wire_bytes": wire, "dispatch": trainer.plan.describe()}

    def seconds(mode: str) -> float:
        dist.barrier()
        started = time.perf_counter()
        trainers[mode].train_step()
        return time.perf_counter() - started

    speed = link_speed()
    figures = {mode: recorded_step(mode) for mode in MODES}
    times = interleaved({mode: lambda mode=mode: seconds(mode) for mode in MODES}, settings["rounds"], warmup=0)
    dist.barrier()
    layout.destroy()
    return {"bytes_per_second": speed, "modes": {m: figures[m] | {"seconds": times[m]} for m in MODES}}


def merged(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the processes' figures the larger: the slower one's times, the busier one's bytes."""
    modes = {}
    for mode in MODES:
        parts = [result["modes"][mode] for result in results]
        modes[mode] = {
            "seconds": [max(step) for step in zip(*(part["seconds"] for part in parts), strict=True)],
            "ep_bytes": max(part["ep_bytes"] for part in parts),
            "wire_bytes": max(part["wire_bytes"] for part in parts),
            "dispatch": parts[0]["dispatch"],
        }
    return {"bytes_per_second": min(result["bytes_per_second"] for result in results), "modes": modes}


def report(link: str, figures: dict[str, Any]) -> None:
    """Print one link's table and add its summaries to `figures`."""
    speed = figures["bytes_per_second"]
    print(f"\n{link}/s link, gloo reaches {8e-6 * speed:,.0f} Mbit/s")
    rows = []
    for mode, figure in figures["modes"].items():
        figure["step"] = step = summary(figure["seconds"])
        figure["baseline_over_this"] = gain = ratios(figures["modes"][BASELINE]["seconds"], figure["seconds"])
        rows.append([
            mode, f"{step['median']:.3f}", f"{step['q1']:.3f}-{step['q3']:.3f}", f"{gain['median']:.2f}",
            f"{figure['ep_bytes'] / 1e6:.1f}", f"{figure['wire_bytes'] / 1e6:.1f}",
            f"{figure['wire_bytes'] / speed:.3f}", figure["dispatch"],
        ])  # fmt: skip
    print_table(["", "step s", "quartiles", "baseline/this", "ep MB", "wire MB", "floor s", "dispatch"], rows)


def parse() -> argparse.Namespace:
    """Options; the default takes about five minutes on two cores."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024, help="width of the model")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512, help="per process and step, one sequence")
    parser.add_argument("--experts", type=int, default=8, help="N")
    parser.add_argument("--rounds", type=int, default=6, help="timed steps of each mode on each link")
    threads = max((os.cpu_count() or 1) // PROCESSES, 1)
    parser.add_argument("--threads", type=int, default=threads, help="of each process; default: half the cores")
    parser.add_argument("--output", type=Path, help="JSON file to write, another than results/two_nodes.json")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def stop(*_: object) -> NoReturn:
    """A signal's handler: leave through every ``finally``."""
    sys.exit(1)


def main() -> None:
    """Measure, print and write down."""
    args = parse()
    if args.worker is not None:
        print(json.dumps(work(args.worker)))
        return
    signal.signal(signal.SIGTERM, stop)
    names = ("tokens", "experts", "rounds", "threads")
    links: dict[str, dict[str, Any]] = {}
    try:
        with tempfile.TemporaryDirectory(prefix="malora-two-nodes-") as scratch:
            write_inputs(Path(scratch), llama_like(args.hidden, args.layers), args.tokens)
            settings = {name: getattr(args, name) for name in names} | {"directory": scratch}
            for link, rate in LINKS.items():
                with two_hosts(rate) as hosts:
                    links[link] = merged(train_on(hosts, settings))
                report(link, links[link])
    except NetworkError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    setting = {name: getattr(args, name) for name in ("hidden", "layers", *names)}
    write_results(__file__, {"setting": setting, "links": links}, "megatron-core", output=args.output)
    print()
    headline(
        **{
            f"{BASELINE}/malora_auto@{link}": figures["modes"]["malora_auto"]["baseline_over_this"]["median"]
            for link, figures in links.items()
        }
    )


if __name__ == "__main__":
    main()
