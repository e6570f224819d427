"""The best evaluation so far, and since when there was none better."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from malora_dist.config_sections import VALIDATION_METRICS


@dataclass
class Best:
    """Follows one metric through the evaluations of a run; goes into checkpoints, so that a resumed run counts on.

    Attributes:
        metric: its tag, as logged.
        value: the best so far; None: there was no evaluation, or none with a number.
        iteration: of the best.
        without_improvement: evaluations since the last that improved by more than the threshold.
    """

    metric: str
    value: float | None = None
    iteration: int = 0
    without_improvement: int = 0

    @property
    def greater_is_better(self) -> bool:
        return VALIDATION_METRICS[self.metric.partition("/")[0]]

    def is_best(self, iteration: int) -> bool:
        """Whether there was an evaluation after this very iteration and it is the best so far."""
        return self.value is not None and iteration == self.iteration

    def update(self, value: float, iteration: int, threshold: float = 0.0) -> bool:
        """Take in an evaluation; whether it is the best so far. NaN is never better than anything.

        Args:
            threshold: what is better by no more than this is the best, but counts as no improvement.
        """
        gain = self._gain(value)
        self.without_improvement = 0 if gain > threshold else self.without_improvement + 1
        if gain > 0:
            self.value, self.iteration = value, iteration
        return gain > 0

    def _gain(self, value: float) -> float:
        """By how much it is better than the best so far."""
        if math.isnan(value):
            return -math.inf
        if self.value is None:
            return math.inf
        return value - self.value if self.greater_is_better else self.value - value

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and texts, for a checkpoint."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's; figures of another metric say nothing about this one and are left out."""
        if state.get("metric") == self.metric:
            vars(self).update({key: value for key, value in state.items() if key in vars(self)})

    def describe(self) -> str:
        """One line for the end of a run that has evaluated."""
        return f"best {self.metric}: {self.value:.4g} at iteration {self.iteration}"
