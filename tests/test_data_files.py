"""The kinds of files that records are read from: what each gives, its fingerprint, its errors."""

from __future__ import annotations

import csv
import datetime
import gzip
import hashlib
import io
import json
import os
import re
from decimal import Decimal
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from malora_dist.config_sections import DataConfig, TaskConfig
from malora_dist.data.dataset import load_tasks
from malora_dist.data.reading import Reading
from malora_dist.data.records import Record, read_records
from malora_dist.errors import ConfigError, DataError
from tests.test_data_text import letter_tokenizer

RECORDS = [{"prompt": "2020-01-01", "completion": 'é, "x"\ny'}, {"prompt": "", "completion": "007"}]
GOOD = b'{"prompt": "p", "completion": "c"}\n'


def content(ending: str) -> bytes:
    """RECORDS as a file of a kind."""
    if ending == ".jsonl":
        return b"".join(json.dumps(record).encode() + b"\n" for record in RECORDS)
    if ending == ".json":
        return json.dumps(RECORDS).encode()
    if ending == ".csv":
        text = io.StringIO()
        rows = csv.DictWriter(text, list(RECORDS[0]))
        rows.writeheader()
        rows.writerows(RECORDS)
        return text.getvalue().encode("utf-8-sig")
    table = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), table)
    return table.getvalue()


def read(file: Path, corrupt_data: str = "refuse") -> tuple[list[tuple[str, Record]], Reading]:
    reading = Reading(corrupt_data)
    return list(read_records(str(file), reading=reading)), reading


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet"])
def test_all_kinds_give_the_same_records(ending: str, compressed: bool, tmp_path: Path) -> None:
    """In any case of the ending; the fingerprint is of the unpacked bytes."""
    raw = content(ending)
    file = tmp_path / f"t{ending.upper()}{'.Gz' if compressed else ''}"
    file.write_bytes(gzip.compress(raw) if compressed else raw)
    found, reading = read(file)
    assert [record for _, record in found] == RECORDS
    assert reading.fingerprint == hashlib.sha256(raw).hexdigest()
    first_line = {".jsonl": (":1", ":2"), ".csv": (":2", ":4")}.get(ending, (": record 1", ": record 2"))
    assert [where for where, _ in found] == [f"{file}{place}" for place in first_line]
    assert TaskConfig(path=str(file)).label == "t"


@pytest.mark.parametrize(
    ("name", "ending"),
    [("notes.TXT", ".txt"), ("t.jsonl.bz2", ".bz2"), ("t", "no ending"), ("t.txt.gz", ".txt.gz"), ("t.gz", ".gz")],
)
def test_other_files_are_refused_and_not_looked_up(
    name: str, ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file := tmp_path / name).write_bytes(GOOD)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("looked up"))
    rule = f"a data file must end in .json, .jsonl, .csv, .parquet, or one of these and .gz, not in {ending}; "
    with pytest.raises(DataError, match=re.escape(f"{file}: {rule}")):
        read(file)


def test_paths_are_checked_before_any_is_read(tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text("{")
    (tmp_path / "notes.txt").write_bytes(GOOD)
    os.mkfifo(tmp_path / "pipe.csv")
    for path, message in (("notes.txt", "must end in"), ("gone.PARQUET", "no such file"), ("pipe.csv", "no such file")):
        for task in ({"path": str(tmp_path / path)}, {"validation_path": str(tmp_path / path)}):
            first = {"path": str(tmp_path / "broken.jsonl"), "name": "first"}
            config = DataConfig(data=[TaskConfig(**first), TaskConfig(**(first | task | {"name": "second"}))])
            with pytest.raises(DataError, match=rf"{path}: .*{message}"):
                load_tasks(config, letter_tokenizer(), seed=1)


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("t.csv", b"prompt,completion\na,b\na,b,c\n", ":3: has 3 values, but the header has 2 columns; put values"),
        ("t.csv", b'prompt,completion\n"a\nb",c\n"a', r":4: not valid CSV \(unexpected end of data\); mend its quotes"),
        ("t.csv", b"prompt,completion\na,b\n\xe9,b\n", ":3: not valid UTF-8"),
        ("t.csv", b"a,b,a\n1,2,3\n", ":1: two columns are named 'a'; rename"),
        ("t.csv", b"prompt,completion\n", ": holds no records"),
        ("t.csv", b"", ": holds no records"),
        ("t.jsonl.gz", GOOD, r": is no whole gzip file \(Not a gzipped file"),
        ("t.jsonl.gz", gzip.compress(GOOD, mtime=0)[:-9], r": is no whole gzip file \(Compressed file ended"),
        ("t.jsonl.gz", gzip.compress(GOOD, mtime=0)[:12] + b"\xff" * 30, ": is no whole gzip file"),
        ("t.parquet", GOOD, ": is no readable Parquet file"),
        ("t.parquet", b"", ": is no readable Parquet file"),
        ("t.parquet", content(".parquet").replace(b"2020", b"\xff\xff\xff\xff"), ": cannot be read after record 0"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_damaged_files(name: str, raw: bytes, message: str, tmp_path: Path) -> None:
    (file := tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match=f"^{re.escape(str(file))}{message}") as raised:
        read(file)
    assert "\n" not in str(raised.value)


def test_rows_of_the_wrong_length_can_be_skipped(tmp_path: Path) -> None:
    (file := tmp_path / "t.csv").write_bytes(b"prompt,completion\na\n\nb,c\n")
    found, reading = read(file, "skip")
    assert found == [(f"{file}:4", {"prompt": "b", "completion": "c"})]
    assert reading.skipped == 1


def test_a_subset_of_a_data_set(tmp_path: Path) -> None:
    files = [f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("one", "two")]
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{''.join(files)}---\n")
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": name, "completion": "c"}))
    [(_, record)] = read_records(str(tmp_path), subset="two")
    assert record["prompt"] == "two"
    with pytest.raises(
        DataError, match=r"with subset 'three' and split 'train' that can be loaded \(.*three.*one.*two"
    ):
        list(read_records(str(tmp_path), subset="three"))
    with pytest.raises(DataError, match=r"with split 'train' that can be loaded \(.*one.*two"):
        list(read_records(str(tmp_path)))
    config = DataConfig(data=[TaskConfig(path=str(tmp_path / "one.jsonl"), subset="two")])
    with pytest.raises(ConfigError, match=r"^data\[one\]\.subset='two': .*one\.jsonl is a file, which has no subsets"):
        load_tasks(config, letter_tokenizer(), seed=1)


def test_the_fingerprint_of_a_data_set_sees_what_json_has_not(tmp_path: Path) -> None:
    values = [datetime.date(2020, 1, 2), datetime.datetime(2020, 1, 2), Decimal("1.5"), b"a", datetime.timedelta(1)]
    others = [datetime.date(2020, 1, 3), datetime.datetime(2020, 1, 3), Decimal("1.6"), b"b", datetime.timedelta(2)]

    def fingerprint(row: list[object]) -> str:
        folder = tmp_path / hashlib.sha256(repr(row).encode()).hexdigest()
        folder.mkdir(exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table([[value] for value in row], list("abcde")), folder / "t.parquet")
        return read(folder)[1].fingerprint

    changed = [[*values[:i], others[i], *values[i + 1 :]] for i in range(len(values))]
    assert len({fingerprint(row) for row in [values, *changed, values]}) == 1 + len(values)
