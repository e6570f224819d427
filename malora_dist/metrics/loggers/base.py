"""What a run reports, what a logger is, and the loggers of a run.

To add a logger is to add a file beside this one with a class that is registered under the name that the config uses.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import yaml

from malora_dist.config import Config
from malora_dist.errors import ConfigError
from malora_dist.metrics.report_file import Table
from malora_dist.registry import Registry


@dataclass
class Metrics:
    """The figures of one step, by tag.

    Attributes:
        scalars: one number each.
        counts: a number for each of 0, 1, 2, ..., for example top-k slots by expert, or seconds by rank.
        tables: what is drawn as pictures; not changed after that.
    """

    scalars: dict[str, float] = field(default_factory=dict)
    counts: dict[str, list[float]] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)
    _drawn: dict[str, bytes] | None = field(default=None, init=False, repr=False, compare=False)

    def pictures(self, caption: str) -> dict[str, bytes]:
        """The tables as PNG, see :func:`malora_dist.metrics.pictures.draw`; drawn once for all who ask."""
        if self._drawn is None:
            from malora_dist.metrics.pictures import draw  # imports matplotlib

            self._drawn = draw(self.tables, caption) if self.tables else {}
        return self._drawn


@dataclass(frozen=True)
class RunDescription:
    """What a logger is told before the first step.

    Attributes:
        config: as resolved.
        banner: the text of the start, see :mod:`malora_dist.metrics.banner`.
        parameters: {kind of adapter parameter: how many, over all ranks}.
        tasks: their names, in the config's order.
        world_size: processes.
        device: ``cpu`` or what the GPU is called.
        iteration: after which the run begins or goes on.
        evaluated: the tasks that are evaluated.
        peak_tflops: what one device can do; 0: not known, then there is no ``mfu``.
    """

    config: Config
    banner: str
    parameters: Mapping[str, int]
    tasks: Sequence[str]
    world_size: int
    device: str
    iteration: int
    evaluated: Sequence[str] = ()
    peak_tflops: float = 0.0


class Logger:
    """What the trainer reports to; a logger overrides what it has a place for."""

    @classmethod
    def check(cls, config: Config) -> None:
        """What every rank can find before the run begins; writes nothing and asks no server.

        Raises:
            ConfigError: the logger cannot work with these settings, or a package is missing.
        """

    @classmethod
    def create(cls, config: Config) -> Self | None:
        """The logger of a run, or None where the config leaves it nowhere to write.

        Raises:
            ConfigError: it cannot write there, or a package is missing.
        """
        raise NotImplementedError

    @classmethod
    def remove(cls, config: Config) -> None:
        """Remove what a former run has reported into `save`, and nothing else.

        Raises:
            OSError: it cannot be removed.
        """

    def begin(self, run: RunDescription) -> None:
        """The run begins."""

    def message(self, text: str) -> None:
        """Lines for who watches the run."""

    def warn(self, text: str, step: int) -> None:
        """What looks wrong at a step, and the cure."""

    def log(self, metrics: Metrics, step: int) -> None:
        """The figures of a step."""

    def close(self) -> None:
        """Flush and close."""


LOGGERS: Registry[Logger] = Registry("malora_dist.metrics.loggers", "loggers")


class Loggers(Logger):
    """Several loggers as one, or none: what every rank but the one that reports has."""

    def __init__(self, loggers: Sequence[Logger] = ()) -> None:
        self._loggers = loggers

    def begin(self, run: RunDescription) -> None:
        for logger in self._loggers:
            logger.begin(run)

    def message(self, text: str) -> None:
        for logger in self._loggers:
            logger.message(text)

    def warn(self, text: str, step: int) -> None:
        for logger in self._loggers:
            logger.warn(text, step)

    def log(self, metrics: Metrics, step: int) -> None:
        for logger in self._loggers:
            logger.log(metrics, step)

    def close(self) -> None:
        for logger in self._loggers:
            logger.close()


def config_as_yaml(config: Config) -> str:
    """The resolved config, every key."""
    return str(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True))


def has_failed() -> bool:
    """In a logger's `close`: whether it is an error that ends the run."""
    return sys.exc_info()[0] is not None


def check_loggers(config: Config) -> None:
    """See :meth:`Logger.check`, of all loggers that the config names.

    Raises:
        ConfigError: one is unknown, or cannot work.
    """
    for name in dict.fromkeys(config.loggers):
        LOGGERS[name].check(config)


def make_loggers(config: Config, replaces: bool = False) -> Loggers:
    """The loggers that the config names.

    Args:
        replaces: the run takes the place of another in `save`: what that one has reported there, to any logger, goes.

    Raises:
        ConfigError: one is unknown, cannot work, or cannot write.
    """
    check_loggers(config)
    if replaces:
        _remove_reports(config)
    made = [LOGGERS[name].create(config) for name in dict.fromkeys(config.loggers)]
    return Loggers([logger for logger in made if logger is not None])


def _remove_reports(config: Config) -> None:
    for logger in LOGGERS.values():
        try:
            logger.remove(config)
        except OSError as error:
            rule = f"holds reports of another run that cannot be removed ({error})"
            raise ConfigError("save", config.save, rule, "name another directory") from error
