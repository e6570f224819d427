"""A file of JSON lines beside the checkpoints: what other programs read, a run in progress included.

Its format: :mod:`malora_dist.metrics.report_file`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from typing import Any, Self

from malora_dist.config import Config
from malora_dist.errors import ConfigError
from malora_dist.metrics.loggers.base import LOGGERS, Logger, Metrics, RunDescription, has_failed
from malora_dist.metrics.report_file import FILE_NAME, VERSION


@LOGGERS.register("jsonl")
class JsonlLogger(Logger):
    """Appends to a file; if it cannot write any more it says so and stops.

    Raises:
        ConfigError: it cannot even begin.
    """

    def __init__(self, file: Path) -> None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._file = file.open("ab", buffering=0)  # each line by one write: a killed run leaves whole ones
            if file.stat().st_size and not _ends_with_newline(file):
                self._file.write(b"\n")  # after a line that a full disk or a power cut has torn
        except OSError as error:
            cure = "name another directory"
            raise ConfigError("save", str(file), f"cannot be written ({error.strerror})", cure) from error

    @classmethod
    def create(cls, config: Config) -> Self | None:
        return cls(Path(config.save) / FILE_NAME) if config.save else None

    @classmethod
    def remove(cls, config: Config) -> None:
        if config.save:
            (Path(config.save) / FILE_NAME).unlink(missing_ok=True)

    def begin(self, run: RunDescription) -> None:
        values = {f.name: getattr(run, f.name) for f in dataclasses.fields(run) if f.name != "banner"}
        self._write("begin", version=VERSION, **values | {"config": dataclasses.asdict(run.config)})

    def message(self, text: str) -> None:
        self._write("message", text=text)

    def warn(self, text: str, step: int) -> None:
        self._write("warning", step=step, text=text)

    def log(self, metrics: Metrics, step: int) -> None:
        tables = {name: table._asdict() for name, table in metrics.tables.items()}
        parts = {"scalars": metrics.scalars, "counts": metrics.counts, "tables": tables}
        self._write("log", step=step, **{name: part for name, part in parts.items() if part})

    def close(self) -> None:
        if not self._file.closed:
            self._write("end", failed=has_failed())
            self._file.close()

    def _write(self, kind: str, **content: Any) -> None:
        if self._file.closed:
            return
        line = json.dumps(_finite({"kind": kind, "time": time.time(), **content}), separators=(",", ":"))
        try:
            left = memoryview(line.encode() + b"\n")
            while left:  # a disk that is nearly full takes a part
                left = left[self._file.write(left) :]
        except OSError as error:
            self._file.close()
            text = f"jsonl: {self._file.name}: cannot be written ({error.strerror}); it ends here"
            print(text, file=sys.stderr, flush=True)


def _ends_with_newline(file: Path) -> bool:
    with file.open("rb") as content:
        content.seek(-1, 2)
        return content.read() == b"\n"


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
