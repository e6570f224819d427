"""Reading records: where each one stands, and what it holds.

Local .json/.jsonl files are read by the standard library's ``json``, which keeps every value as
written and knows the line of an error. (``datasets``' JSON builder infers column types: strings
that look like dates come back as datetimes, and its errors name no line.) Everything else,
hub data sets and local data set folders, is read by ``datasets``.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from malora_dist.data.reading import Reading
from malora_dist.errors import DataError, first_line
from malora_dist.files import is_regular_file

#: One row: {column: value}.
Record = dict[str, Any]

_SUFFIXES = (".json", ".jsonl")


def read_records(path: str, split: str = "train", reading: Reading | None = None) -> Iterator[tuple[str, Record]]:
    """Yield (where, record), ``where`` being ``FILE:LINE`` or ``NAME: record N`` for messages.

    JSON Lines are streamed; a JSON array is held in memory while it is read.

    Args:
        path: a local .json/.jsonl file, or anything ``datasets.load_dataset`` takes as a name.
        split: split of such a data set; a local file has only one.
        reading: is given all that is read, so that its fingerprint is of the very bytes that become records, and
            says what becomes of a record that cannot be used.

    Raises:
        DataError: no such file or data set, malformed JSON, a row that is no object, no rows.
    """
    reading = reading or Reading()
    is_file = Path(path).suffix in _SUFFIXES
    records = _file_records(Path(path), reading) if is_file else _hub_records(path, split, reading)
    count = 0
    for where, load in records:
        with reading.record():
            record = load()
            if not isinstance(record, dict):
                raise DataError(f"{where}: a record must be a JSON object, not {_shown(record)}; mend or remove it")
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
        found = ", ".join(record) or "none"
        raise DataError(f"{where}: no column {column!r} (found: {found}); add it or remove the record")
    value = record[column]
    if not isinstance(value, str):
        raise DataError(f"{where}: {column}={_shown(value)}: must be a string; mend or remove the record")
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


#: (where, what makes the value of the record, or raises its DataError)
_Unread = Iterator[tuple[str, Callable[[], Any]]]


def _file_records(path: Path, reading: Reading) -> _Unread:
    if not is_regular_file(path):
        raise DataError(f"{path}: no such file; check the path, relative ones start at the working directory")
    with _opened(path) as file:
        start = file.read(1024).removeprefix(codecs.BOM_UTF8).lstrip()
        file.seek(0)
        if start.startswith(b"["):
            records = _parse(reading.add(file.read()), path, 1)
            yield from ((f"{path}: record {i}", partial(_same, record)) for i, record in enumerate(records, start=1))
        else:
            for number, line in enumerate(file, start=1):
                if reading.add(line).strip():
                    yield f"{path}:{number}", partial(_parse, line.rstrip(), path, number)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions and its disk") from error


def _same(record: Any) -> Any:
    return record


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
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets in brackets in ...
        raise DataError(f"{path}:{line}: not usable JSON ({first_line(error)}); mend or remove it") from error


def _hub_records(name: str, split: str, reading: Reading) -> _Unread:
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
        reading.add(json.dumps(record, default=lambda value: type(value).__name__).encode() + b"\n")
        yield f"{name}[{split}]: record {i}", partial(_same, record)


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
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except RecursionError:
        return f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."
