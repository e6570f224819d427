"""Reading records: where each one stands, and what it holds.

Local .json/.jsonl files are read by the standard library's ``json``, which keeps every value as
written and knows the line of an error. (``datasets``' JSON builder infers column types: strings
that look like dates come back as datetimes, and its errors name no line.) Everything else,
hub data sets and local data set folders, is read by ``datasets``.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from malora_dist.errors import DataError

#: One row: {column: value}.
Record = dict[str, Any]

_SUFFIXES = (".json", ".jsonl")


class Fingerprint:
    """SHA-256 of what a reader has read: of a local file its bytes, of a data set its records."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, content: bytes) -> bytes:
        """Take what comes next into account; returns it."""
        self._hash.update(content)
        return content

    def hexdigest(self) -> str:
        """The fingerprint of all content so far."""
        return self._hash.hexdigest()


def read_records(
    path: str, split: str = "train", fingerprint: Fingerprint | None = None
) -> Iterator[tuple[str, Record]]:
    """Yield (where, record), ``where`` being ``FILE:LINE`` or ``NAME: record N`` for messages.

    JSON Lines are streamed; a JSON array is held in memory while it is read.

    Args:
        path: a local .json/.jsonl file, or anything ``datasets.load_dataset`` takes as a name.
        split: split of such a data set; a local file has only one.
        fingerprint: is given all that is read, so that it is of the very bytes that become records.

    Raises:
        DataError: no such file or data set, malformed JSON, a row that is no object, no rows.
    """
    fingerprint = fingerprint or Fingerprint()
    is_file = Path(path).suffix in _SUFFIXES
    records = _file_records(Path(path), fingerprint) if is_file else _hub_records(path, split, fingerprint)
    count = 0
    for where, record in records:
        if not isinstance(record, dict):
            raise DataError(f"{where}: a record must be a JSON object, not {_shown(record)}; mend or remove it")
        count += 1
        yield where, record
    if count == 0:
        raise DataError(f"{path}: holds no records; name another file or remove the task")


def write_records(file: Path, records: Iterable[Record]) -> Path:
    """Write a record per line, directories included; returns the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


def text_of(record: Record, column: str, where: str) -> str:
    """The string in a column.

    Raises:
        DataError: the column is missing or not a string.
    """
    if column not in record:
        found = ", ".join(record) or "none"
        raise DataError(f"{where}: no column {column!r} (found: {found}); add it or remove the record")
    value = record[column]
    if not isinstance(value, str):
        raise DataError(f"{where}: {column}={_shown(value)}: must be a string; mend or remove the record")
    return value


def _file_records(path: Path, fingerprint: Fingerprint) -> Iterator[tuple[str, Any]]:
    if not path.is_file():
        raise DataError(f"{path}: no such file; check the path, relative ones start at the working directory")
    with path.open("rb") as file:
        start = file.read(1024).removeprefix(codecs.BOM_UTF8).lstrip()
        file.seek(0)
        if start.startswith(b"["):
            records = _parse(fingerprint.add(file.read()), path, 1)
            yield from ((f"{path}: record {i}", record) for i, record in enumerate(records, start=1))
        else:
            for number, line in enumerate(file, start=1):
                if fingerprint.add(line).strip():
                    yield f"{path}:{number}", _parse(line.rstrip(), path, number)


def _parse(raw: bytes, path: Path, line: int) -> Any:
    """The JSON value in ``raw``, which starts at the given line of the file."""
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        raise DataError(f"{path}:{line}: not valid UTF-8 ({error.reason}); save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{line + error.lineno - 1}: not valid JSON ({error.msg}, column {error.colno}); "
            "a file is either one JSON object per line or one array of objects"
        ) from error


def _hub_records(name: str, split: str, fingerprint: Fingerprint) -> Iterator[tuple[str, Any]]:
    import datasets  # here, because it takes seconds to import and local files do not need it

    try:
        with _no_progress_bars():
            dataset = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{name}: neither a {' or '.join(_SUFFIXES)} file nor a data set with split {split!r} "
            f"that can be loaded ({reason}); check path and split"
        ) from error
    for i, record in enumerate(dataset, start=1):
        fingerprint.add(json.dumps(record, default=str).encode() + b"\n")
        yield f"{name}[{split}]: record {i}", record


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep ``datasets`` quiet: every rank would draw its own bars."""
    import datasets

    was_on = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if was_on:
            datasets.enable_progress_bars()


def _shown(value: object) -> str:
    """A value for a message: as in JSON, cut to one short line."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
