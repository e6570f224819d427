"""What a run reports, what a logger is, and the loggers of a run.

To add a logger is to add a file beside this one with a function ``make(config) -> Logger | None``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from malora_dist.config import Config


@dataclass
class Metrics:
    """The figures of one step, by tag.

    Attributes:
        scalars: one number each.
        counts: how often each of 0, 1, 2, ... occurred, for example top-k slots by expert.
    """

    scalars: dict[str, float] = field(default_factory=dict)
    counts: dict[str, list[float]] = field(default_factory=dict)


class Logger(Protocol):
    """What the trainer reports to."""

    def message(self, text: str) -> None:
        """Lines for who watches the run."""
        ...

    def log(self, metrics: Metrics, step: int) -> None:
        """The figures of a step; a logger leaves out what it does not show."""
        ...

    def close(self) -> None:
        """Flush and close."""
        ...


class Loggers:
    """Several loggers as one, or none: what every rank but the one that reports has."""

    def __init__(self, loggers: Sequence[Logger] = ()) -> None:
        self._loggers = loggers

    def message(self, text: str) -> None:
        for logger in self._loggers:
            logger.message(text)

    def log(self, metrics: Metrics, step: int) -> None:
        for logger in self._loggers:
            logger.log(metrics, step)

    def close(self) -> None:
        for logger in self._loggers:
            logger.close()


def make_loggers(config: Config) -> Loggers:
    """The loggers that the config wants, of all files beside this one, by name."""
    package = __name__.rpartition(".")[0]
    names = [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)])]
    makers = [importlib.import_module(f"{package}.{name}").make for name in names if name != "base"]
    made = [make(config) for make in makers]
    return Loggers([logger for logger in made if logger is not None])
