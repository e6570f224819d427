"""Reading records: where each one stands, and what it holds.

Local files are read by :mod:`malora_dist.data.data_files`; hub data sets and local data set folders by ``datasets``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import date, time, timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

from malora_dist.data.data_files import LISTED_ENDINGS, UnreadRecords, as_is, file_records, is_data_file
from malora_dist.data.reading import Reading
from malora_dist.errors import DataError

#: One row: {column: value}.
Record = dict[str, Any]


def read_records(
    path: str, split: str = "train", reading: Reading | None = None, subset: str = ""
) -> Iterator[tuple[str, Record]]:
    """Yield (where, record), ``where`` being ``FILE:LINE`` or ``NAME: record N`` for messages.

    Args:
        path: a local file with one of the endings of ``data_files``, or anything that ``datasets.load_dataset`` takes
            as a name.
        split: split of such a data set; a local file has only one.
        reading: is given all that is read, so that its fingerprint is of the very bytes that become records, and
            says what becomes of a record that cannot be used.
        subset: configuration of such a data set; a local file has none.

    Raises:
        DataError: no such file or data set, a file of another kind, malformed content, a row that is no object, no
            rows.
    """
    reading = reading or Reading()
    is_file = is_data_file(path)
    records = file_records(Path(path), reading) if is_file else _hub_records(path, subset, split, reading)
    count = 0
    for where, load in records:
        with reading.record():
            record = load()
            if not isinstance(record, dict):
                raise DataError(
                    f"{where}: a record must be a JSON object, not {value_shown(record)}; mend or remove it"
                )
            count += 1
            yield where, record
    reading.check_not_empty(path, count)


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
        raise DataError(f"{where}: no column {column!r} (found: {columns_of(record)}); add it or remove the record")
    value = record[column]
    if not isinstance(value, str):
        raise DataError(f"{where}: {column}={value_shown(value)}: must be a string; mend or remove the record")
    return writable(value, column, where)


def writable(text: str, what: str, where: str) -> str:
    """The text itself, if it can be written as UTF-8, which JSON does not ask of its strings.

    Raises:
        DataError: it holds one half of a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise DataError(f"{where}: {what} holds {half!r}, half a character; mend or remove the record") from error
    return text


def _hub_records(name: str, subset: str, split: str, reading: Reading) -> UnreadRecords:
    import datasets  # here, because it takes seconds to import and local files do not need it

    try:
        with _no_progress_bars():
            dataset = datasets.load_dataset(name, subset or None, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join((str(error).strip() or type(error).__name__).split("\n\n")[0].split())
        asked = f"subset {subset!r} and split {split!r}" if subset else f"split {split!r}"
        raise DataError(
            f"{name}: neither a data file ({LISTED_ENDINGS}) nor a data set with {asked} "
            f"that can be loaded ({reason}); check path, subset and split"
        ) from error
    for i, record in enumerate(dataset, start=1):
        reading.add(json.dumps(record, default=_fingerprinted).encode() + b"\n")
        yield f"{name}[{split}]: record {i}", partial(as_is, record)


def _fingerprinted(value: object) -> str:
    """What stands in a fingerprint for a value that JSON has not; a picture's text would differ between processes."""
    has_exact_text = isinstance(value, date | time | timedelta | Decimal | bytes)
    return str(value) if has_exact_text else type(value).__name__


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


def columns_of(record: Record) -> str:
    """The names of a record's columns, for a message."""
    return _printable(", ".join(record)) or "none"


def value_shown(value: object) -> str:
    """A value for a message: as in JSON, cut to one short line."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except RecursionError:
        return f"a deeply nested {type(value).__name__}"
    return _printable(text if len(text) <= 60 else f"{text[:57]}...")


def _printable(text: str) -> str:
    """The text with halves of surrogate pairs, which no terminal or file takes, as escapes."""
    return text.encode(errors="backslashreplace").decode()
