"""Jobs and the comparison of tests/test_errors*.py."""

from __future__ import annotations

import io
import os
import re
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch


class Ended(NamedTuple):
    """How a command ended."""

    code: object
    stdout: str
    stderr: str


def train_main(arguments: list[str]) -> Ended:
    """``python -m malora_dist.train ARGUMENTS``, in this process; ranks do not wait for rank 0 to speak first.

    $RANK in an argument is the number of the rank, for files that differ between machines.
    """
    from malora_dist import train

    rank = os.environ.get("RANK", "0")
    stdout, stderr = io.StringIO(), io.StringIO()
    code: object = 0
    with (
        patch.object(sys, "argv", ["malora_dist.train", *(a.replace("$RANK", rank) for a in arguments)]),
        patch("malora_dist.errors.time.sleep"),
        redirect_stdout(stdout),
        redirect_stderr(stderr),
    ):
        try:
            train.main()
        except SystemExit as end:
            code = end.code
        except BaseException:  # noqa: BLE001  as Python does it; the pool lives on
            traceback.print_exc()
            code = 1
    return Ended(code, stdout.getvalue(), stderr.getvalue())


def train_with_a_logger_that_cannot_begin(arguments: list[str]) -> Ended:
    """:func:`train_main` with the logger ``failing``."""
    from malora_dist.config import Config
    from malora_dist.errors import ConfigError
    from malora_dist.metrics.loggers.base import LOGGERS, Logger, RunDescription

    class Failing(Logger):
        @classmethod
        def create(cls, config: Config) -> Failing:
            return cls()

        def begin(self, run: RunDescription) -> None:
            raise ConfigError("loggers", "failing", "does not answer", "name another")

    with LOGGERS.registered(failing=Failing):
        return train_main(arguments)


def check_refused(ended: Ended, expected: str, save: Path, rank: int = 0) -> None:
    """One line that reads as expected, exit code 2, nothing printed, nothing saved."""
    assert ended.stderr.count("\n") == 1, ended.stderr
    prefix = f"[rank {rank}] " if rank else ""
    pattern = ".*".join(re.escape(part) for part in f"{prefix}error: {expected}\n".split("..."))
    assert re.fullmatch(pattern, ended.stderr), f"\n  got      {ended.stderr}  expected {expected}"
    assert ended.code == 2
    assert ended.stdout == ""
    assert not save.exists()
