"""A run's reports, read back from its file of JSON lines, also while the run adds to it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from malora_dist.errors import DataError
from malora_dist.metrics.report_file import BEGIN, FILE_NAME, VERSION, Table


@dataclass
class History:
    """What a run has reported, without the steps that it made again after a restart.

    Attributes:
        run: the last line of kind ``begin``; empty before the first.
        scalars: {tag: {step: value}}, steps in order.
        counts: {tag: {step: values}}.
        tables: {tag: {step: table}}.
        warnings: (step, text) of each.
        times: {step: when it was reported, seconds since 1970}.
        last_time: when it has written its last line of any kind, seconds since 1970.
        has_ended: whether the last start of the run has ended by itself,
        has_failed: and that with an error.
    """

    run: dict[str, Any] = field(default_factory=dict)
    scalars: dict[str, dict[int, float]] = field(default_factory=dict)
    counts: dict[str, dict[int, list[float]]] = field(default_factory=dict)
    tables: dict[str, dict[int, Table]] = field(default_factory=dict)
    warnings: list[tuple[int, str]] = field(default_factory=list)
    times: dict[int, float] = field(default_factory=dict)
    last_time: float = 0.0
    has_ended: bool = False
    has_failed: bool = False

    def add(self, line: dict[str, Any]) -> None:
        """Take in one line of the file."""
        kind, self.last_time = line["kind"], line["time"]
        self.has_ended = kind == "end"
        self.has_failed = self.has_ended and line.get("failed", False)
        if kind == "begin":
            for name in BEGIN:
                line[name]  # a KeyError is the caller's to tell
            self.run = line
            self._forget_after(line["iteration"])
        elif kind == "warning":
            self.warnings.append((line["step"], line["text"]))
        elif kind == "log":
            self.times[line["step"]] = line["time"]
            for tag, value in line.get("scalars", {}).items():
                self.scalars.setdefault(tag, {})[line["step"]] = float("nan") if value is None else value
            for tag, values in line.get("counts", {}).items():
                self.counts.setdefault(tag, {})[line["step"]] = values
            for tag, table in line.get("tables", {}).items():
                self.tables.setdefault(tag, {})[line["step"]] = Table(**table)

    def _forget_after(self, iteration: int) -> None:
        """A start goes on from this iteration: what came later has not been."""
        self.warnings = [(step, text) for step, text in self.warnings if step <= iteration]
        every: list[dict[int, Any]] = [*self.scalars.values(), *self.counts.values(), *self.tables.values(), self.times]
        for series in every:
            for step in [step for step in series if step > iteration]:
                del series[step]


class HistoryReader:
    """Reads a file bit by bit, as it grows.

    Args:
        run: the directory that a run saves to, or the file itself.

    Raises:
        DataError: there is no such file.
    """

    def __init__(self, run: Path) -> None:
        self.file = run / FILE_NAME if run.is_dir() else run
        if not self.file.is_file():
            raise DataError(f"{self.file}: no such file; name the `save` of a run that has the logger jsonl")
        self.history = History()
        self._read_bytes = self._read_lines = 0

    def read(self) -> History:
        """Take in what is new, whole lines only.

        Raises:
            DataError: a line is not of this format, with its number; or the file cannot be read.
        """
        try:
            self._take_new_lines()
        except OSError as error:
            raise DataError(f"{self.file}: cannot be read ({error.strerror}); name a run that is there") from error
        return self.history

    def _take_new_lines(self) -> None:
        if self.file.stat().st_size < self._read_bytes:  # another run has begun here
            self.history, self._read_bytes, self._read_lines = History(), 0, 0
        with self.file.open("rb") as content:
            content.seek(self._read_bytes)
            for line in content:
                if not line.endswith(b"\n"):
                    break  # being written
                self._read_bytes += len(line)
                self._read_lines += 1
                if line.strip():
                    self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            parsed = json.loads(line)
        except ValueError:
            return  # torn by a power cut or a full disk; the run has begun a new line after it
        place = f"{self.file}:{self._read_lines}"
        if isinstance(parsed, dict) and parsed.get("kind") == "begin" and parsed.get("version") != VERSION:
            is_of = f"is of version {parsed.get('version')} of this file's format, and this program reads {VERSION}"
            raise DataError(f"{place}: {is_of}; use the malora_dist that wrote it")
        try:
            self.history.add(parsed)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{place}: is no line of a run's reports ({error!r}); remove the line") from error
