"""How far a run is, as a bar on the last line of a terminal; where there is no terminal, nothing."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import TextIO, TypeVar

from tqdm import tqdm

T = TypeVar("T")

#: A phase that is over sooner is not shown.
_DELAY_SECONDS = 0.5
_COUNTED = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}, ETA {remaining}{postfix}]"
_UNCOUNTED = "{desc} ... {elapsed}"
_YELLOW = "\033[33m"
_PLAIN = "\033[0m"


def is_terminal(stream: TextIO) -> bool:
    """Whether somebody looks at it who sees a bar move."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


class Progress:
    """The phase that a run is in; one at a time, and one inside another hides it.

    Args:
        is_shown: on the one rank that reports; a stream that is no terminal is left alone.
    """

    def __init__(self, is_shown: bool) -> None:
        self._is_shown = is_shown and is_terminal(sys.stdout)
        self._bar: tqdm | None = None

    @contextlib.contextmanager
    def phase(self, text: str, total: int | None = None, done: int = 0) -> Iterator[None]:
        """What is inside is this phase.

        Args:
            total: calls of :meth:`advance`; None: nobody counts, the time that it takes is shown.
            done: of the total.
        """
        if not self._is_shown:
            yield
            return
        outer = self._bar
        if outer is not None:
            outer.clear()
            outer.disable = True  # draws nothing until the inner one is over
        with contextlib.ExitStack() as stack:
            self._bar = bar = tqdm(
                desc=text, total=total, initial=done, file=sys.stdout, position=0, leave=False, dynamic_ncols=True,
                delay=_DELAY_SECONDS, smoothing=0, bar_format=_UNCOUNTED if total is None else _COUNTED,
            )  # fmt: skip
            stack.callback(self._leave, bar, outer)
            if total is None:
                stack.enter_context(_ticking(bar))
            yield

    def _leave(self, bar: tqdm, outer: tqdm | None) -> None:
        bar.clear()  # close() does not, of one that was only refreshed
        bar.close()
        self._bar = outer
        if outer is not None:
            outer.disable = False
            outer.refresh()

    def advance(self, note: str = "") -> None:
        """One more of the phase's total is done.

        Args:
            note: shown beside it.
        """
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update()

    def counted(self, items: Iterable[T]) -> Iterator[T]:
        """The items; each that has been worked on advances the phase."""
        for item in items:
            yield item
            self.advance()

    def over(self, items: Sequence[T], text: str) -> Iterator[T]:
        """The items, as a phase of their own."""
        with self.phase(text, len(items)):
            yield from self.counted(items)


@contextlib.contextmanager
def _ticking(bar: tqdm) -> Iterator[None]:
    """Show the time go by."""
    ended = threading.Event()

    def tick() -> None:
        while not ended.wait(_DELAY_SECONDS):
            bar.refresh()

    thread = threading.Thread(target=tick, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def write_above(text: str, stands_out: bool = False) -> None:
    """Print lines to stdout, above the bar if there is one.

    Args:
        stands_out: in yellow, on a terminal; NO_COLOR is honoured.
    """
    if not is_terminal(sys.stdout):
        print(text, flush=True)
        return
    if stands_out and not os.environ.get("NO_COLOR"):
        text = f"{_YELLOW}{text}{_PLAIN}"
    with tqdm.external_write_mode(file=sys.stdout):
        print(text, flush=True)
