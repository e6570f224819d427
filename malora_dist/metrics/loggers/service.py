"""What the loggers of optional packages share: the package, failures during a run, and what a resumed run adds to."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from malora_dist.config import Config
from malora_dist.errors import ConfigError, first_line
from malora_dist.metrics.loggers.base import Logger


def check_extra(extra: str, *packages: str) -> None:
    """Refuse an extra of setup.py of which a package is missing; imports none, which takes seconds.

    Raises:
        ConfigError: names the extra.
    """
    missing = next((package for package in packages if importlib.util.find_spec(package) is None), None)
    if missing:
        raise _missing(extra, f"{missing} is not installed")


def import_extra(extra: str, *packages: str) -> None:
    """See that the packages of an extra can be imported, too.

    Raises:
        ConfigError: names the extra.
    """
    try:
        for package in packages:
            importlib.import_module(package)
    except ImportError as error:
        raise _missing(extra, str(error)) from error


def _missing(extra: str, reason: str) -> ConfigError:
    cure = f"in this project's checkout: pip install --editable '.[{extra}]' --constraint constraints.txt"
    return ConfigError("loggers", extra, f"needs the extra {extra} ({reason})", cure)


class ServiceLogger(Logger):
    """Hands figures to a package; if that fails during a run it says so in one line, and the run goes on without it."""

    #: As in the config; also the extra that has the package.
    name: ClassVar[str]

    def __init__(self, config: Config) -> None:
        self._config = config
        self._is_open = False

    @classmethod
    def remove(cls, config: Config) -> None:
        """What the service itself has stays there; a run that begins anew is another to it."""
        RunId(config, cls.name).remove()

    def _try(self, action: Callable[[], Any]) -> None:
        """Do it while nothing has failed yet."""
        if not self._is_open:
            return
        try:
            action()
        except Exception as error:  # noqa: BLE001  whatever happens to a service must not end training
            self._is_open = False
            text = f"{self.name}: cannot be written ({first_line(error)}); it ends here"
            print(text, file=sys.stderr, flush=True)


class RunId:
    """The name that a service has for a run, in a file beside the checkpoints; without `save` it is not kept."""

    def __init__(self, config: Config, service: str) -> None:
        self._file = Path(config.save) / f"{service}_run_id" if config.save else None

    def read(self, iteration: int) -> str:
        """Of the run that goes on after this iteration; empty where a run begins."""
        if self._file is None or iteration == 0 or not self._file.is_file():
            return ""
        return self._file.read_text(encoding="utf-8").strip()

    def remove(self) -> None:
        """The run that has this name is another."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def write(self, run_id: str) -> None:
        """For those who go on."""
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.write_text(f"{run_id}\n", encoding="utf-8")
