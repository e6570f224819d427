"""What a run shows on a terminal besides its lines, and that a pipe gets the lines alone."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import termios
import time
from collections.abc import Iterator

import pytest

from malora_dist.metrics.loggers.console import ConsoleLogger
from malora_dist.progress import Progress


@contextlib.contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """stdout is a terminal; what it got is in the list afterwards."""
    shown: list[str] = []
    leader, follower = os.openpty()
    termios.tcsetwinsize(follower, (24, 80))
    with open(follower, "w") as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        patch.setenv("TERM", "xterm")
        yield shown
        stdout.flush()
        shown.append(_all_of(leader))
    os.close(leader)


def _all_of(leader: int) -> str:
    os.set_blocking(leader, False)
    read = b""
    with contextlib.suppress(BlockingIOError):
        while True:
            read += os.read(leader, 1 << 12)
    return read.decode()


def a_run(is_writer: bool = True, seconds: float = 0.0) -> None:
    progress, logger = Progress(is_writer), ConsoleLogger(3)
    with progress.phase("loading x"):
        time.sleep(seconds)
    assert list(progress.over(["a", "b"], "tokenising y")) == ["a", "b"]
    with progress.phase("training", total=3, done=1):
        logger.message("going on")
        progress.advance("lm loss 0.5")
        with progress.phase("evaluating z", total=2):
            logger.warn("hot", 2)
            progress.advance()
        logger.message("evaluated")
    logger.message("saved")


def test_a_terminal_shows_a_bar_below_the_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    with terminal(monkeypatch) as shown:
        a_run(seconds=0.6)
    (text,) = shown
    assert "\rloading x ... 00:00" in text
    assert "tokenising" not in text, "over at once"
    assert " 67%|" in text
    assert "| 2/3 [00:00, ETA 00:00, lm loss 0.5]" in text
    assert "evaluating z   0%|" in text
    lines = text.split("\n")
    for line, stands in zip(
        lines, ("going on", "\033[33mwarning at iteration 2: hot\033[0m", "evaluated", "saved"), strict=False
    ):
        assert line.split("\r")[-2] == stands, "a line of its own, nothing of the bar beside it"
    assert lines[-1] == ""
    assert lines[2].count("training") == 1, "one bar at a time: the outer one comes back when the inner one is over"
    assert all("evaluating" not in line for line in lines[3:])


def test_a_pipe_and_other_ranks_show_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", pipe)
        a_run()
    lines = "going on\nwarning at iteration 2: hot\nevaluated\nsaved\n"
    assert pipe.getvalue() == lines
    monkeypatch.setenv("NO_COLOR", "1")
    with terminal(monkeypatch) as shown:
        a_run(is_writer=False)
    assert shown == [lines.replace("\n", "\r\n")]
