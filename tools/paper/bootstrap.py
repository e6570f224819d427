"""Paired differences with 95% intervals: the same seeds and the same questions on both sides, resampled together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

#: {test: [seeds, questions]}.
Values = Mapping[str, np.ndarray]
RESAMPLES = 4000


class Interval(NamedTuple):
    """A figure and its 95% interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    def text(self, digits: int = 1, scale: float = 1.0, signed: bool = True) -> str:
        """``+1.2 [0.3, 2.1]``."""
        sign = "+" if signed else ""
        value, low, high = (number * scale for number in self)
        return f"{value:{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


class Draws:
    """Resamplings of seeds and questions, the same for everything that is compared.

    Seeds stand for the start values and the order of the data, questions for the test set. Both are drawn with
    replacement, questions within their test. Of n seeds n - 1 are drawn: the spread of their mean is then that of the
    unbiased estimate, which matters for so few.

    Args:
        questions: {test: how many}.
    """

    def __init__(self, seeds: int, questions: Mapping[str, int], key: int = 0) -> None:
        rng = np.random.default_rng(key)
        drawn = max(1, seeds - 1)
        self._seeds = rng.multinomial(drawn, np.full(seeds, 1 / seeds), RESAMPLES) / drawn
        self._questions = {
            test: (rng.multinomial(count, np.full(count, 1 / count), RESAMPLES) / count).astype(np.float32)
            for test, count in questions.items()
        }

    def means(self, values: Values) -> tuple[np.ndarray, np.ndarray]:
        """(mean of every test [tests], the same in every resampling [resamplings, tests])."""
        observed = np.array([table.mean() for table in values.values()])
        resampled = [
            np.einsum("bq,bq->b", (self._seeds @ table).astype(np.float32), self._questions[test])
            for test, table in values.items()
        ]
        return observed, np.stack(resampled, axis=1)

    def interval(self, values: Values, statistic: Callable[[np.ndarray], np.ndarray]) -> Interval:
        """A statistic of the tests' means, for example their average.

        Args:
            statistic: [..., tests] -> [...].
        """
        observed, resampled = self.means(values)
        low, high = np.quantile(statistic(resampled), (0.025, 0.975))
        return Interval(float(statistic(observed)), float(low), float(high))


def average(means: np.ndarray) -> np.ndarray:
    """Over the tests."""
    return means.mean(axis=-1)


def worst(means: np.ndarray) -> np.ndarray:
    """The lowest of the tests."""
    return means.min(axis=-1)


def draws_for(values: Values) -> Draws:
    """Resamplings that fit these values."""
    seeds = next(iter(values.values())).shape[0]
    return Draws(seeds, {test: table.shape[1] for test, table in values.items()})


def over_seeds(values: Sequence[float]) -> Interval:
    """The mean of a figure of every seed."""
    table = {"": np.array(values, dtype=np.float64)[:, None]}
    return draws_for(table).interval(table, average)


def difference(a: Values, b: Values) -> dict[str, np.ndarray]:
    """a - b, question by question.

    Raises:
        ValueError: they are not of the same tests, seeds and questions.
    """
    if {t: v.shape for t, v in a.items()} != {t: v.shape for t, v in b.items()}:
        raise ValueError("only the same tests, seeds and questions can be paired")
    return {test: a[test] - b[test] for test in a}


def stack(rows: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, np.ndarray]:
    """One row per seed -> {test: [seeds, questions]}."""
    return {test: np.array([row[test] for row in rows], dtype=np.float64) for test in rows[0]}
