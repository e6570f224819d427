"""The layout in which a method is fastest, and the number of experts at which one dispatch overtakes another."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from scaling_cluster import Cluster
from scaling_model import Bytes, Times, memory, step_time
from scaling_parts import BF16, Contender, Layout, Model, dispatch_of

from malora_dist.exchange.base import EXCHANGES
from malora_dist.methods.spec import AdapterSpec

TENSOR_PARALLEL, PIPELINE_PARALLEL = (1, 2, 4, 8), (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Job:
    """What every layout has in common.

    Attributes:
        ep: least number of expert-parallel ranks, if there are as many experts.
        distributed_optimizer: whether Adam's state is sharded over data-parallel ranks.
    """

    seq_length: int
    micro_batch_size: int
    ep: int
    distributed_optimizer: bool

    @property
    def micro_tokens(self) -> int:
        return self.seq_length * self.micro_batch_size

    def layout(self, gpus: int, tp: int, pp: int, ep: int, tokens: int, recompute: bool = False) -> Layout:
        """Of a step of `tokens` tokens over all ranks."""
        sizes = (self.micro_tokens, self.seq_length)
        return Layout(gpus, tp, pp, ep, tokens, *sizes, recompute, self.distributed_optimizer)


@dataclass(frozen=True)
class Run:
    """A method in one layout."""

    contender: Contender
    layout: Layout
    times: Times
    memory: Bytes

    @property
    def where(self) -> str:
        """TPxPPxEP, with an R behind it where layers are recomputed."""
        return f"{self.layout.tp}x{self.layout.pp}x{self.layout.ep}{'R' if self.layout.recompute else ''}"


def candidates(
    cluster: Cluster, model: Model, contender: Contender, job: Job, gpus: int, tokens: int
) -> Iterator[list[Layout]]:
    """Layouts, one list for each (TP, PP): first those without recompute, and from the least EP up."""
    for tp, pp in itertools.product(TENSOR_PARALLEL, PIPELINE_PARALLEL):
        dp = gpus // (tp * pp)
        if tp > cluster.gpus_per_node or model.layers % pp or dp * job.micro_tokens > tokens:
            continue
        experts = contender.spec.num_experts if contender.dispatch != "local" else 1
        sizes = [2**i for i in range(12) if min(job.ep, experts) <= 2**i <= min(experts, dp)]
        yield [job.layout(gpus, tp, pp, ep, tokens, recompute) for recompute in (False, True) for ep in sizes]


def best(cluster: Cluster, model: Model, contender: Contender, job: Job, gpus: int, tokens: int) -> Run | None:
    """The fastest of the layouts that fit; of one (TP, PP) the first that does. None: no layout fits."""
    runs = []
    for layouts in candidates(cluster, model, contender, job, gpus, tokens):
        for layout in layouts:
            size = memory(cluster, model, contender, layout)
            if size.total <= cluster.memory:
                runs.append(Run(contender, layout, step_time(cluster, model, contender, layout), size))
                break
    return min(runs, key=lambda run: run.times.total, default=None)


def sent_bytes(model: Model, spec: AdapterSpec, dispatch: str, ep: int, tokens: int, itemsize: int = BF16) -> float:
    """Bytes one rank sends in a step, TP and PP 1; `tokens`: its own, of the step."""
    sites = [site for linear in model.linears for site in linear.sites(spec, 1, ep, tokens, itemsize)]
    return model.layers * sum(EXCHANGES[dispatch].bytes_sent(site) for site in sites)


def first_multiple(holds: Callable[[int], bool], ep: int, most: int = 65536) -> int | None:
    """Least multiple of EP for which `holds`, which goes on to hold once it does. None: not up to `most`."""
    low, high = 0, 1
    while not holds(high * ep):
        low, high = high, 2 * high
        if high * ep > most:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle * ep) else (middle, high)
    return high * ep


def crossovers(
    cluster: Cluster, model: Model, malora: Callable[[int, str], Contender], job: Job, ep: int, tokens: int
) -> dict[str, int | None]:
    """Experts from which all_to_all sends less, takes less time, and is what ``auto`` takes, for one linear or for all.

    TP and PP are 1 and memory is no limit.

    Args:
        malora: the contender of so many experts and that ``dispatch``.
        tokens: of one data-parallel rank in one step.
    """
    layout = job.layout(ep, 1, 1, ep, tokens * ep)

    def sends_less(experts: int) -> bool:
        spec = malora(experts, "auto").spec
        ways = [sent_bytes(model, spec, dispatch, ep, tokens) for dispatch in ("all_to_all", "gather_experts")]
        return ways[0] < ways[1]

    def is_faster(experts: int) -> bool:
        ways = [malora(experts, dispatch) for dispatch in ("all_to_all", "gather_experts")]
        times = [step_time(cluster, model, contender, layout).total for contender in ways]
        return times[0] < times[1]

    def taken(experts: int) -> list[bool]:
        auto = malora(experts, "auto")
        return [dispatch_of(auto, linear, layout) == "all_to_all" for linear in model.adapted(auto.spec)]

    return {
        "bytes": first_multiple(sends_less, ep),
        "time": first_multiple(is_faster, ep),
        "auto_first": first_multiple(lambda experts: any(taken(experts)), ep),
        "auto_all": first_multiple(lambda experts: all(taken(experts)), ep),
    }
