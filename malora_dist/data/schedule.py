"""The training order: a pure function of the seed and the position."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np

#: Samples per block, up to one per task. Within a block the tasks come in random order.
_BLOCK = 1024


def keyed_permutation(size: int, *key: object) -> np.ndarray:
    """A permutation of ``range(size)``, int64 [size], that is a pure function of the key.

    RandomState is the generator of numpy whose stream is frozen for good: a run can be resumed
    under another version.
    """
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return np.random.RandomState(np.frombuffer(digest, dtype="<u4")).permutation(size)


class SampleSchedule:
    """Which sample of which task stands at each position of the training run.

    The positions are cut into blocks. Up to the end of block b, task t has had exactly
    ``floor((b + 1) * 1024 * p_t)`` samples, p_t being its share of the weights. Within a block the
    tasks are shuffled. So the mixture never strays from the weights by more than one block, and
    how often a task came before any position is known without history. The n-th sample of a task
    is entry ``n % size`` of its permutation of epoch ``n // size``: an epoch has no repeats.

    A resumed run therefore needs nothing but the number of samples consumed.

    Args:
        sizes: training samples of each task.
        weights: mixing weights, relative to one another.
        seed: another seed is another order.

    Raises:
        ValueError: no tasks, unequal lengths, an empty task or a weight that is not positive.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        if not sizes or len(sizes) != len(weights):
            raise ValueError(f"{len(sizes)} sizes and {len(weights)} weights: give one of each per task")
        if min(sizes) < 1 or not all(0 < weight < math.inf for weight in weights):
            raise ValueError(f"sizes={list(sizes)} and weights={list(weights)} must be positive and finite")
        self._sizes = tuple(sizes)
        self._shares = tuple(weight / math.fsum(weights) for weight in weights)
        self._seed = seed
        self._epochs: dict[int, tuple[int, np.ndarray]] = {}  # task: its latest (epoch, permutation)

    def samples(self, start: int, count: int) -> list[tuple[int, int]]:
        """(task, index) at positions start .. start + count - 1, whatever was asked before."""
        found: list[tuple[int, int]] = []
        block = self._block_of(start)
        skip = start - sum(self._before(block))
        while len(found) < count:
            found += self._block(block, skip, skip + count - len(found))
            block, skip = block + 1, 0
        return found

    def _before(self, block: int) -> list[int]:
        """Samples each task has had before a block."""
        return [math.floor(block * _BLOCK * share) for share in self._shares]

    def _block_of(self, position: int) -> int:
        block = position // _BLOCK
        while sum(self._before(block)) > position:  # rounding errors of the shares
            block -= 1
        while sum(self._before(block + 1)) <= position:  # what floor() held back
            block += 1
        return block

    def _block(self, block: int, start: int, stop: int) -> list[tuple[int, int]]:
        """Entries start .. stop - 1 of a block, or up to its end."""
        counts = self._before(block)
        new = [after - before for before, after in zip(counts, self._before(block + 1), strict=True)]
        tasks = np.repeat(np.arange(len(new)), new)[keyed_permutation(sum(new), self._seed, "block", block)]
        for task, number in enumerate(np.bincount(tasks[:start], minlength=len(new))):
            counts[task] += int(number)
        found = []
        for task in tasks[start:stop].tolist():
            found.append((task, self._index(task, counts[task])))
            counts[task] += 1
        return found

    def _index(self, task: int, ordinal: int) -> int:
        """Index of a task's sample number ``ordinal``."""
        epoch, place = divmod(ordinal, self._sizes[task])
        if task not in self._epochs or self._epochs[task][0] != epoch:
            self._epochs[task] = epoch, keyed_permutation(self._sizes[task], self._seed, "epoch", task, epoch)
        return int(self._epochs[task][1][place])
