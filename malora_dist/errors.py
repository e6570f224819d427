"""Errors a user can act on: each names what is wrong, its value, the rule and the cure.

Entry points turn them into one line on stderr and exit code 2 (:func:`exit_on_user_error`).
Anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable, Sequence

EXIT_CODE = 2
#: Longest value in a message.
_LONGEST = 300


def first_line(error: BaseException) -> str:
    """What an exception says, on one line that is not too long; its type if it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0][:_LONGEST] if text else type(error).__name__


def first_few(names: Sequence[str], most: int) -> str:
    """So many names in one line, and how many more there are: ``a, b and 3 more``."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def shown(value: object) -> str:
    """``repr`` for a message, cut if it is long."""
    if isinstance(value, str) and len(value) > _LONGEST:
        return repr(f"{value[:_LONGEST]}...")
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits; lists in lists in lists ...
        return f"a {type(value).__name__} too long to be shown"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


class MaloraError(ValueError):
    """Base of all errors caused by the user's input rather than by a bug."""


class ConfigError(MaloraError):
    """A config key holds a value that cannot work.

    Args:
        key: the config key, as written in YAML or on the command line.
        value: the value found there.
        rule: what the value has to satisfy.
        cure: what the user can do about it.
    """

    def __init__(self, key: str, value: object, rule: str, cure: str) -> None:
        self.key = key
        super().__init__(f"{key}={shown(value)}: {rule}; {cure}")


class DataError(MaloraError):
    """A data file cannot be used; the message starts with ``file:line`` where a line is known."""


class CheckpointError(MaloraError):
    """A checkpoint or model directory is missing, incomplete, or belongs to something else."""


class TrainingError(MaloraError):
    """Training cannot go on, for what its numbers have become."""


class BackendUnavailableError(MaloraError):
    """A backend asked for cannot run on this machine; the message names one that can."""


def exit_on_user_error(main: Callable[[], None]) -> Callable[[], None]:
    """Wrap an entry point: a :class:`MaloraError` becomes one stderr line and exit code 2.

    Under torchrun every rank meets the same error. Rank 0 reports it; the others wait a moment
    for torchrun to stop them, and speak only if they are still alive, so that an error seen by
    one rank alone is never lost.
    """

    @functools.wraps(main)
    def wrapped() -> None:
        try:
            main()
        except MaloraError as error:
            rank = int(os.environ.get("RANK", "0"))
            if rank != 0:
                time.sleep(15.0)
            prefix = f"[rank {rank}] " if rank != 0 else ""
            message = " ".join(str(error).splitlines())  # names of files may hold line breaks
            print(f"{prefix}error: {message}", file=sys.stderr, flush=True)
            sys.exit(EXIT_CODE)

    return wrapped
