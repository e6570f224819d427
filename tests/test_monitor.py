"""The terminal view of runs, from files made by hand."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from malora_dist.metrics.history import History, HistoryReader
from malora_dist.metrics.monitor import Monitor, run_names, short
from malora_dist.metrics.run_state import RunState, duration
from malora_dist.metrics.sparklines import sparkline

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {"method": "malora", "num_lora_experts": 8, "train_iters": 100, "exit_interval": 0, "lr": 0.1}


def write_run(directory: Path, steps: int = 4, ended: bool = False, failed: bool | None = None, **config: Any) -> Path:
    """Reports every 10 steps and 5 seconds from time 1000."""
    parts = {"config": CONFIG | config, "parameters": {"P": 1500}, "tasks": ["add", "sort"], "device": "cpu"}
    lines: list[dict[str, Any]] = [{"kind": "begin", "version": 1, "world_size": 2, "iteration": 0, **parts}]
    for i in range(1, steps + 1):
        scalars = {
            "lm loss": 4.0 / i, "lm loss/add": 3.0 / i, "lm loss/sort": 5.0 / i, "malora/balance/max": 4.5,
            "malora/balance/median": 1.0, "malora/balance/p90": 2.0, "malora/effective experts": 0.5,
            "malora/dead experts": 0.25, "tokens-per-second": 1234567.0, "time share/compute": 0.7,
            "time share/ep": 0.25, "memory/peak GiB": 1.5,
        }  # fmt: skip
        lines.append({"kind": "log", "step": 10 * i, "time": 1000 + 5 * i, "scalars": scalars})
    validation = {"lm loss validation": 2.0, "lm loss validation/add": 0.125}
    lines.append({"kind": "log", "step": 10 * steps, "time": 1000 + 5 * steps, "scalars": validation})
    lines.append({"kind": "warning", "step": 20, "time": 1000 + 5 * steps, "text": "too hot"})
    end = {"kind": "end", "time": 1000 + 5 * steps} | ({} if failed is None else {"failed": failed})
    lines += [end] if ended else []
    directory.mkdir()
    text = "".join(json.dumps({"time": 1000.0, **line}) + "\n" for line in lines)
    (directory / "metrics.jsonl").write_text(text)
    return directory


def shown(width: int, *runs: Path, height: int | None = None, now: float = 1022.0) -> list[str]:
    readers = [HistoryReader(run) for run in runs]
    with open("/dev/null", "w") as nowhere:
        console = Console(record=True, width=width, file=nowhere)
        monitor = Monitor([reader.file for reader in readers])
        console.print(monitor.draw([reader.read() for reader in readers], now, console, height))
    lines = console.export_text().splitlines()
    assert all(len(line) <= width for line in lines)
    return [" ".join(line.split()) for line in lines]


def test_one_run(tmp_path: Path) -> None:
    lines = shown(80, write_run(tmp_path / "a"))
    for line in (
        "malora, 1,500 trained, 2 x cpu",
        "state going on, last report 2 s ago",
        "ETA 0:00:28",
        "! iteration 20: too hot",
        "add █▄▂▁ 3.000 0.750 0.750 ▁ 0.125 0.125 0.125",
        "time compute 70% ep 25%",
        "memory peak 1.50 GiB",
    ):
        assert line in lines
    assert any(line.startswith("largest load ███") and line.endswith("4.50 of 8") for line in lines)
    assert any(line.startswith("effective ███") and line.endswith("4.00 of 8") for line in lines)
    assert any(line.startswith("iteration ███") and line.endswith("40/100 40%") for line in lines)
    assert any(line.startswith("tokens/s") and line.endswith("1.2M 1.2M 1.2M") for line in lines)


def test_runs_side_by_side(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", steps=10, ended=True, lr=0.2)
    lines = shown(80, a, b)
    assert lines[0] == "run a b"
    assert "lr 0.1 0.2" in lines
    assert "state going on, last report 2 s ago done, 0 s ago" in lines
    assert "! b, iteration 20: too hot" in lines
    row = lines.index("add █▄▂▁ 3.000 0.750 0.750 █▆▅▄▃▂▂▂▁ 3.000 0.300 0.300")
    assert lines[row + 1] == "validation ▁ 0.125 0.125 0.125 ▁ 0.125 0.125 0.125"
    assert "run b" in shown(50, a, b), "below one another where there is no room"
    low = shown(80, a, b, height=len(lines) - 2)
    assert "and 1 more" in low
    assert not any(line.startswith("sort") for line in low)


@pytest.mark.parametrize(
    ("now", "ended", "state"),
    [(1040.0, False, "going on, last report 20 s ago"), (1060.0, False, "silent for 40 s (usual 5 s)"),
     (9000.0, True, "ended before its last iteration, 2 h 13 min ago")],
)  # fmt: skip
def test_whether_a_run_goes_on(now: float, ended: bool, state: str, tmp_path: Path) -> None:
    history = HistoryReader(write_run(tmp_path / "a", ended=ended)).read()
    run = RunState("a", history, now)
    assert run.describe()[0] == state
    assert (run.seconds_left is not None) == state.startswith("going on")


@pytest.mark.parametrize(("failed", "state"), [(True, "failed, 2 s ago"), (False, "done, 2 s ago")])
def test_whether_a_run_has_failed(failed: bool, state: str, tmp_path: Path) -> None:
    history = HistoryReader(write_run(tmp_path / "a", steps=10, ended=True, failed=failed)).read()
    assert RunState("a", history, 1052.0).describe() == (state, "bold red" if failed else "green")


@pytest.mark.parametrize(
    ("reports", "now", "state"),
    [(0, 1100.0, "begun, last line 1 min ago"), (0, 4000.0, "silent for 50 min (no report yet)"),
     (1, 1100.0, "going on, last report 40 s ago"), (1, 1400.0, "silent for 5 min (usual 1 min)")],
)  # fmt: skip
def test_a_run_that_is_killed_early_becomes_silent(reports: int, now: float, state: str) -> None:
    history = History()
    history.add({"kind": "begin", "time": 1000.0, "iteration": 0, "config": CONFIG, "parameters": {"P": 1}, "tasks": [],
                 "world_size": 1, "device": "cpu"})  # fmt: skip
    for i in range(1, reports + 1):
        history.add({"kind": "log", "time": 1000.0 + 60 * i, "step": i})
    assert RunState("a", history, now).describe()[0] == state


def test_small_pictures() -> None:
    assert sparkline([1, 2, 3, math.nan, 8], 9) == "▁▂▃x█"
    assert sparkline([0, 2, 6, 8], 2) == "▁█"
    assert sparkline([5, 5], 9) == "▁▁"
    assert sparkline([], 9) == sparkline([1.0], 0) == ""
    values = (0.0, 4e-5, 0.0123, 0.07, 12.3456, 123.45, -1234.5, 123456, 999_999, 1.2e6, math.nan, math.inf)
    texts = ("0.000", "4.0e-5", "0.012", "0.070", "12.346", "123.5", "-1,234", "123k", "1000k", "1.2M", "nan", "inf")
    assert tuple(short(value) for value in values) == texts
    assert [duration(s) for s in (0.25, 59, 61, 7500, 1e6)] == ["0.2 s", "59 s", "1 min", "2 h 5 min", "11 days"]
    assert run_names([Path("/x/runs/a/m.jsonl"), Path("/x/runs/b/m.jsonl")]) == ["a", "b"]


def test_the_tool(tmp_path: Path) -> None:
    """Piped it shows one picture without control characters; no torch, so it starts at once; errors are a line."""
    code = "import runpy, sys; runpy.run_path('tools/monitor.py', run_name='__main__'); print('torch' in sys.modules)"
    for arguments, status in ((write_run(tmp_path / "a"), 0), (tmp_path, 2)):
        done = subprocess.run([sys.executable, "-c", code, arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == status
        if status:
            assert done.stderr.startswith(f"error: {tmp_path}/metrics.jsonl: no such file; name the `save` of a run")
            assert done.stderr.count("\n") == 1
        else:
            assert done.stdout.endswith("False\n")
            assert all(character.isprintable() or character == "\n" for character in done.stdout)
