"""The console: messages, a line of figures for each logged step, a line of losses for each evaluation."""

from __future__ import annotations

import datetime
from typing import Self

from malora_dist.config import Config
from malora_dist.metrics.loggers.base import LOGGERS, Logger, Metrics, RunDescription
from malora_dist.progress import write_above

#: (tag, its name on the console, format), in order; a figure that a step does not have is left out.
_FIGURES = (
    ("lm loss", "lm loss", ".4f"),
    ("learning-rate", "lr", ".2e"),
    ("grad-norm", "grad-norm", ".3f"),
    ("malora/balance/median", "balance", ".2f"),
    ("tokens-per-second", "tokens/s", ",.0f"),
    ("iteration-time", "s/it", ".3f"),
)
_VALIDATION = "lm loss validation/"


@LOGGERS.register("console")
class ConsoleLogger(Logger):
    """Prints; on a terminal above the bar of :mod:`malora_dist.progress`, warnings in yellow."""

    def __init__(self, train_iters: int) -> None:
        self._train_iters = train_iters

    @classmethod
    def create(cls, config: Config) -> Self:
        return cls(config.train_iters)

    def begin(self, run: RunDescription) -> None:
        self.message(run.banner)

    def message(self, text: str) -> None:
        write_above(text)

    def warn(self, text: str, step: int) -> None:
        write_above(f"warning at iteration {step}: {text}", stands_out=True)

    def log(self, metrics: Metrics, step: int) -> None:
        if "lm loss" in metrics.scalars:
            self.message(self._progress(metrics.scalars, step))
        losses = {tag: loss for tag, loss in metrics.scalars.items() if tag.startswith(_VALIDATION)}
        if losses:
            by_task = ", ".join(f"{tag.removeprefix(_VALIDATION)} {loss:.4f}" for tag, loss in losses.items())
            self.message(f"validation at iteration {step}: {by_task}")

    def _progress(self, scalars: dict[str, float], step: int) -> str:
        """``iteration 20/400 | lm loss 2.31 | ... | ETA 0:01:20``"""
        figures = [f"{name} {scalars[tag]:{form}}" for tag, name, form in _FIGURES if tag in scalars]
        left = scalars["iteration-time"] * (self._train_iters - step)
        iteration = f"iteration {step:{len(str(self._train_iters))}d}/{self._train_iters}"
        return " | ".join((iteration, *figures, f"ETA {datetime.timedelta(seconds=round(left))}"))
