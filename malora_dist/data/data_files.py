"""Local files of records: JSON, JSON Lines, CSV and Parquet, each also as .gz.

JSON is read by the standard library, which keeps every value as written and knows the line of an error.
(``datasets``' JSON builder infers column types: strings that look like dates come back as datetimes, and its errors
name no line.) The same holds for CSV, of which every value is a text.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

from malora_dist.data.reading import Reading
from malora_dist.errors import DataError, first_line
from malora_dist.files import foreign_reader, is_regular_file

#: (where, what makes the value of the record, or raises its DataError)
UnreadRecords = Iterator[tuple[str, Callable[[], Any]]]

ENDINGS = (".json", ".jsonl", ".csv", ".parquet")
LISTED_ENDINGS = f"{', '.join(ENDINGS)}, or one of these and .gz"


def is_data_file(path: str) -> bool:
    """Whether a path names a file rather than a data set: by its ending in any case, whether it is there or not.

    Raises:
        DataError: it is there, is no directory, and has another ending; or it is no file where its ending says so.
    """
    if _ending(path).removesuffix(".gz") in ENDINGS:
        if not is_regular_file(path):
            raise DataError(f"{path}: no such file; check the path, relative ones start at the working directory")
        return True
    if os.path.lexists(path) and not os.path.isdir(path):
        ending = _ending(path) or "no ending"
        raise DataError(f"{path}: a data file must end in {LISTED_ENDINGS}, not in {ending}; rename or convert it")
    return False


def file_records(path: Path, reading: Reading) -> UnreadRecords:
    """Yield the records of a file, ``where`` being ``FILE:LINE`` or ``FILE: record N``.

    JSON Lines and CSV are streamed; a JSON array or a Parquet file is held in memory while it is read.

    Raises:
        DataError: the file as a whole cannot be read.
    """
    ending = _ending(str(path))
    with _opened(path, ending.endswith(".gz")) as file:
        kind = ending.removesuffix(".gz")
        if kind == ".parquet":
            yield from _parquet_records(reading.add(file.read()), path)
        elif kind == ".csv":
            yield from _csv_records(file, path, reading)
        else:
            yield from _json_records(file, path, reading)


def _ending(path: str) -> str:
    """``.jsonl`` or ``.jsonl.gz``, in small letters."""
    name = Path(path.lower())
    return f"{Path(name.stem).suffix}.gz" if name.suffix == ".gz" else name.suffix


@contextmanager
def _opened(path: Path, is_compressed: bool) -> Iterator[BinaryIO]:
    try:
        with cast(BinaryIO, gzip.open(path)) if is_compressed else path.open("rb") as file:
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: is no whole gzip file ({first_line(error)}); copy or compress it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions and its disk") from error


def _json_records(file: BinaryIO, path: Path, reading: Reading) -> UnreadRecords:
    start = file.read(1024).removeprefix(codecs.BOM_UTF8).lstrip()
    file.seek(0)
    if start.startswith(b"["):
        records = _parse(reading.add(file.read()), path, 1)
        yield from ((f"{path}: record {i}", partial(as_is, record)) for i, record in enumerate(records, start=1))
    else:
        for number, line in enumerate(file, start=1):
            if reading.add(line).strip():
                yield f"{path}:{number}", partial(_parse, line.rstrip(), path, number)


def _parse(raw: bytes, path: Path, line: int) -> Any:
    """The JSON value in ``raw``, which starts at the given line of the file."""
    text = ""
    try:
        text = raw.decode("utf-8-sig")
        return json.loads(text)
    except UnicodeDecodeError as error:
        raise _not_utf8(error, path, line + raw.count(b"\n", 0, error.start)) from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{line + error.lineno - 1}: not valid JSON ({error.msg}, column {error.colno}); "
            "a file is either one JSON object per line or one array of objects"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets in brackets in ...
        line += text.count("\n", 0, _first_unusable(text))
        raise DataError(f"{path}:{line}: not usable JSON ({first_line(error)}); mend or remove it") from error


def _first_unusable(text: str) -> int:
    """Where the first element of a JSON array starts that cannot be parsed; 0 for a text that is no array."""
    decoder, place = json.JSONDecoder(), 0
    array = re.match(r"\s*\[\s*", text)
    try:
        while array:
            place = array.end()
            _, end = decoder.raw_decode(text, place)
            array = re.compile(r"\s*,\s*").match(text, end)
    except (ValueError, RecursionError):
        pass
    return place


def _not_utf8(error: UnicodeDecodeError, path: Path, line: int) -> DataError:
    return DataError(f"{path}:{line}: not valid UTF-8 ({error.reason}); save the file as UTF-8")


def _csv_records(file: BinaryIO, path: Path, reading: Reading) -> UnreadRecords:
    """The rows below a header; a quoted value may hold line breaks, and the line of a row is its first."""
    rows = csv.reader(_csv_lines(file, path, reading), strict=True)
    header: list[str] = []
    line = 1
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            cure = "mend its quotes, or save it as JSON Lines"
            raise DataError(f"{path}:{line}: not valid CSV ({first_line(error)}); {cure}") from error
        if row is None:
            return
        if row and not header:
            header = row
            if len(set(header)) < len(header):
                twice = next(name for name in header if header.count(name) > 1)
                raise DataError(f"{path}:{line}: two columns are named {twice!r}; rename or remove one")
        elif row:
            where = f"{path}:{line}"
            yield where, partial(_csv_record, header, row, where)
        line = rows.line_num + 1


def _csv_lines(file: BinaryIO, path: Path, reading: Reading) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        try:
            yield reading.add(line).decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf8(error, path, number) from error


def _csv_record(header: list[str], row: list[str], where: str) -> dict[str, str]:
    if len(row) != len(header):
        cure = "put values that hold commas in quotes, or remove the row"
        raise DataError(f"{where}: has {len(row)} values, but the header has {len(header)} columns; {cure}")
    return dict(zip(header, row, strict=True))


def _parquet_records(content: bytes, path: Path) -> UnreadRecords:
    import pyarrow.parquet  # here, because the other files do not need it

    count = 0
    cure = "copy or write it again"
    with foreign_reader(path, cure, "is no readable Parquet file", DataError):
        batches = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content)).iter_batches()
    while True:
        with foreign_reader(path, cure, f"cannot be read after record {count}", DataError):
            batch = next(batches, None)
            records = [] if batch is None else batch.to_pylist()
        if batch is None:
            return
        for record in records:
            count += 1
            yield f"{path}: record {count}", partial(as_is, record)


def as_is(record: Any) -> Any:
    """What reads a record that needs no more reading."""
    return record
