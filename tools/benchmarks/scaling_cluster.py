"""Rates of a cluster, and the seconds that they make of operations, bytes and collectives; used by scaling.py."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


def _assume(default: float, help_text: str, source: str) -> Any:
    return field(default=default, metadata={"help": help_text, "source": source})


@dataclass(frozen=True)
class Group:
    """A process group: `size` ranks, `stride` apart. The ranks of a node are consecutive."""

    size: int
    stride: int


@dataclass(frozen=True)
class Op:
    """Kernels that run one after the other: operations, bytes read and written, how many."""

    flops: float
    nbytes: float
    kernels: int
    is_float32: bool = False


@dataclass(frozen=True)
class Cluster:
    """Rates in operations, bytes and seconds; per GPU and per direction. Each field is an option of scaling.py."""

    gpus_per_node: int = _assume(8, "GPUs joined by NVLink", "DGX/HGX H100")
    memory: float = _assume(80e9, "bytes of memory of a GPU", "H100 SXM data sheet")
    reserved: float = _assume(8e9, "of them: CUDA context, NCCL, temporaries, fragmentation", "assumed")
    bf16_flops: float = _assume(989e12, "dense bfloat16 operations per second", "H100 SXM data sheet")
    fp32_flops: float = _assume(67e12, "float32 operations per second (router; torch's default, no TF32)", "data sheet")
    gemm_efficiency: float = _assume(0.5, "share of peak of the base's passes, small kernels included", "assumed")
    hbm: float = _assume(3.35e12, "bytes per second of a GPU's memory", "H100 SXM data sheet")
    hbm_efficiency: float = _assume(0.75, "share of it that kernels bound by memory reach", "assumed")
    kernel_seconds: float = _assume(4e-6, "least time of a kernel", "assumed")
    host_sync_seconds: float = _assume(30e-6, "the host reads row counts, the queue of kernels runs dry", "assumed")
    nvlink: float = _assume(450e9, "bytes per second inside a node", "NVLink 4 data sheet")
    network: float = _assume(50e9, "bytes per second across nodes", "one 400 Gbit/s InfiniBand port per GPU")
    link_efficiency: float = _assume(0.8, "share of a link's rate that collectives reach", "assumed")
    nvlink_latency: float = _assume(5e-6, "per step of a collective inside a node", "assumed")
    network_latency: float = _assume(12e-6, "per step of a collective across nodes", "assumed")
    overlap: float = _assume(0.8, "share of concurrent compute that hides a transfer under way", "assumed")

    def seconds(self, op: Op) -> float:
        """Roofline of an op, and no less than its kernels take empty."""
        peak = self.fp32_flops if op.is_float32 else self.bf16_flops
        busy = max(op.flops / (peak * self.gemm_efficiency), op.nbytes / (self.hbm * self.hbm_efficiency))
        return max(busy, op.kernels * self.kernel_seconds)

    def members_per_node(self, group: Group) -> int:
        """Ranks of the group that share a node."""
        return max(1, min(group.size, self.gpus_per_node // group.stride))

    def latency(self, group: Group) -> float:
        """log2(size) steps, over the slowest link in the group."""
        crosses = self.members_per_node(group) < group.size
        return (self.network_latency if crosses else self.nvlink_latency) * math.ceil(math.log2(group.size))

    def all_to_all(self, group: Group, sent: float) -> float:
        """Seconds; `sent`: bytes one rank sends to the others, evenly."""
        if group.size == 1:
            return 0.0
        near = self.members_per_node(group) - 1
        each = sent / (group.size - 1) / self.link_efficiency
        return self.latency(group) + max(each * near / self.nvlink, each * (group.size - 1 - near) / self.network)

    def all_gather(self, group: Group, whole: float) -> float:
        """Seconds of an all-gather or a reduce-scatter; `whole`: bytes of all shards together.

        In rings: a rank receives all shards but its own; what enters a node is shared by its ranks' ports.
        """
        if group.size == 1:
            return 0.0
        members = self.members_per_node(group)
        inside = whole * (group.size - 1) / group.size / self.nvlink
        across = whole * (1 - members / group.size) / (members * self.network)
        return self.latency(group) + max(inside, across) / self.link_efficiency

    def all_reduce(self, group: Group, whole: float) -> float:
        """Seconds: a reduce-scatter and an all-gather."""
        return 2 * self.all_gather(group, whole)
