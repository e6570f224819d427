"""Processes that stay alive across tests, so that torch and megatron are imported once.

A job is a module-level function of tests/jobs.py, or of tests/MODULE.py when named MODULE:FUNCTION.
Each run joins a fresh gloo world of the wanted size and leaves it again.
"""

from __future__ import annotations

import gc
import importlib
import io
import multiprocessing
import os
import socket
import time
import traceback
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

JOB_TIMEOUT = 900.0  # a starved machine is slow, not broken


def _pack(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpack(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False, map_location="cpu")


def _serve(connection: Connection) -> None:
    """A worker's life: run jobs until the pipe closes."""
    torch.set_num_threads(1)
    while True:
        try:
            name, environment, kwargs = _unpack(connection.recv_bytes())
        except EOFError:
            return
        os.environ.update(environment)
        module, _, function = name.rpartition(":")
        try:
            result = ("ok", getattr(importlib.import_module(f"tests.{module or 'jobs'}"), function)(**kwargs))
        except BaseException:  # noqa: BLE001  whatever it is, the parent shall see it
            result = ("error", traceback.format_exc())
        connection.send_bytes(_pack(result))
        # Process groups live as long as anything refers to them, a cycle is enough; every gloo group
        # has threads that wake a hundred times a second, and hundreds of them slow all later jobs.
        del result
        gc.collect()
        gc.freeze()  # what lives on is torch and the like: to look through it again takes longer than a small job


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class WorkerPool:
    """Lazily started worker processes; a failed job ends them all, the next job starts new ones."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[tuple[Any, Connection]] = []

    def run(self, job: str, world_size: int, **kwargs: Any) -> list[Any]:
        """Run the job with ``kwargs`` on ``world_size`` ranks; their results by rank."""
        while len(self._workers) < world_size:
            here, there = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(there,), daemon=False)
            process.start()
            there.close()
            self._workers.append((process, here))
        port = str(_free_port())
        for rank in range(world_size):
            environment = {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            }  # fmt: skip
            self._workers[rank][1].send_bytes(_pack((job, environment, kwargs)))
        return self._collect(job, world_size)

    def _collect(self, job: str, world_size: int) -> list[Any]:
        results: dict[int, Any] = {}
        pending = {self._workers[rank][1]: rank for rank in range(world_size)}
        deadline = time.monotonic() + JOB_TIMEOUT
        while pending:
            ready = wait(list(pending), timeout=max(deadline - time.monotonic(), 0.0))
            if not ready:
                self.close()
                raise TimeoutError(f"{job}: ranks {sorted(pending.values())} gave no result in {JOB_TIMEOUT:.0f} s")
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = pending.pop(connection)
                status, value = _unpack(connection.recv_bytes())
                if status == "error":
                    self.close()
                    raise AssertionError(f"{job} failed on rank {rank} of {world_size}:\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(world_size)]

    def close(self) -> None:
        """End all workers."""
        for _, connection in self._workers:
            connection.close()
        for process, _ in self._workers:
            process.join(timeout=10)
            process.terminate()
            process.join()
        self._workers.clear()
