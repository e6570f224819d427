"""The file of JSON lines that a run leaves, and what is read back from it."""

from __future__ import annotations

import contextlib
import json
import math
import resource
from pathlib import Path
from typing import Any

import pytest

from malora_dist.config import Config
from malora_dist.errors import ConfigError, DataError
from malora_dist.metrics.history import HistoryReader
from malora_dist.metrics.loggers.base import Metrics, RunDescription, Table
from malora_dist.metrics.loggers.jsonl import JsonlLogger

TABLE = Table(["0"], ["a", "b"], [[1.0, 0.5]])


def begin(logger: JsonlLogger, iteration: int = 0) -> None:
    logger.begin(RunDescription(Config(lr=0.5), "banner", {"P": 3}, ["add"], 2, "cpu", iteration))


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    begin(logger)
    logger.message("hello")
    logger.log(Metrics({"lm loss": 2.0}, {"seconds": [1.0, 2.0]}, {"load": TABLE}), 10)
    reader = HistoryReader(tmp_path)
    assert reader.read().scalars == {"lm loss": {10: 2.0}}, "while the run goes on"
    logger.log(Metrics({"lm loss": math.nan}), 20)
    logger.warn("too hot", 20)
    assert not reader.read().has_ended
    logger.close()
    history = reader.read()
    assert history.has_ended
    assert (history.run["version"], history.run["config"]["lr"], history.run["tasks"]) == (1, 0.5, ["add"])
    assert (history.run["parameters"], history.run["world_size"], history.run["device"]) == ({"P": 3}, 2, "cpu")
    assert history.scalars["lm loss"][10] == 2.0
    assert math.isnan(history.scalars["lm loss"][20])
    assert (history.counts, history.tables) == ({"seconds": {10: [1.0, 2.0]}}, {"load": {10: TABLE}})
    assert history.warnings == [(20, "too hot")]
    assert list(history.times) == [10, 20]
    for line in reader.file.read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # NaN is no JSON


def test_steps_that_are_made_again_count_once(tmp_path: Path) -> None:
    """A start goes on from iteration 10: what an earlier one reported of later steps is gone."""
    for iteration, losses in ((0, {10: 1.0, 20: 0.9, 30: 0.8}), (10, {20: 0.7}), (0, {10: 0.1})):
        logger = JsonlLogger(tmp_path / "metrics.jsonl")
        begin(logger, iteration)
        for step, loss in losses.items():
            logger.log(Metrics({"lm loss": loss}), step)
            logger.warn("warm", step)
        logger.close()
        history = HistoryReader(tmp_path).read()
        before = {10: 1.0} if iteration else {}
        assert history.scalars["lm loss"] == before | losses
        assert [step for step, _ in history.warnings] == list(before | losses)


def test_a_torn_line_costs_that_line(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"kind":"log","time":1.0,"step":1,"scalars":{"lm lo')
    reader = HistoryReader(file)
    assert reader.read().scalars == {}
    logger = JsonlLogger(file)
    begin(logger)
    logger.log(Metrics({"lm loss": 1.0}), 2)
    assert reader.read().scalars == {"lm loss": {2: 1.0}}


def test_another_run_in_its_place_is_read_from_the_start(tmp_path: Path) -> None:
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    begin(logger)
    logger.log(Metrics({"lm loss": 1.0}), 2)
    reader = HistoryReader(tmp_path)
    reader.read()
    reader.file.write_text('{"kind":"log","time":1.0,"step":1,"scalars":{"x":1.0}}\n')
    assert reader.read().scalars == {"x": {1: 1.0}}


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metrics.jsonl: no such file; name the `save` of a run"):
        HistoryReader(tmp_path / "metrics.jsonl")
    file = tmp_path / "metrics.jsonl"
    for line, rule in (
        ('{"kind":"begin","version":99}', "is of version 99 of this file's format, and this program reads 1; use"),
        ('{"kind":"begin","version":1,"time":1}', r"is no line of a run's reports \(KeyError\('config'\)\)"),
        ('{"kind":"log"}', r"is no line of a run's reports \(KeyError\('time'\)\); remove the line"),
        ("[1]", "is no line of a run's reports"),
        ('{"kind":"log","step":1,"time":1,"tables":{"x":{"cells":[]}}}', "is no line of a run's reports"),
    ):
        file.write_text(f"\n{line}\n")
        with pytest.raises(DataError, match=f"metrics.jsonl:2: {rule}"):
            HistoryReader(file).read()
    with pytest.raises(ConfigError, match=r"^save='.*': cannot be written \(.*\)"):
        JsonlLogger(file / "below")


def test_a_full_disk_ends_the_file_and_not_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    begin(logger)
    file = tmp_path / "metrics.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size, hard))
    try:
        for step in (1, 2):
            logger.log(Metrics({"lm loss": 1.0}), step)
        logger.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert capsys.readouterr().err == f"jsonl: {file}: cannot be written (File too large); it ends here\n"


def test_a_line_that_the_disk_takes_in_parts_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Sipping:
        """A file that takes ten bytes at a time."""

        def __init__(self, file: Any) -> None:
            self.file = file

        closed = False

        def write(self, content: bytes) -> int:
            return int(self.file.write(content[:10]))

        def close(self) -> None:
            self.file.close()

    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    begin(logger)
    monkeypatch.setattr(logger, "_file", Sipping(logger._file))
    for step in (1, 2):
        logger.log(Metrics({"lm loss": 1.0}), step)
    logger.close()
    assert HistoryReader(tmp_path).read().scalars == {"lm loss": {1: 1.0, 2: 1.0}}


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_that_fails_says_so(tmp_path: Path, fails: bool) -> None:
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    with contextlib.suppress(ZeroDivisionError), contextlib.closing(logger):
        begin(logger)
        _ = 1 / (not fails)
    history = HistoryReader(tmp_path).read()
    assert (history.has_ended, history.has_failed) == (True, fails)
