"""Numbers drawn on a terminal: a series as a line of blocks with its figures, a share as a bar. Each fills its cell."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

BLOCKS = "▁▂▃▄▅▆▇█"
ASCII_BLOCKS = "_.-:=+*#"
#: A bar's filled part, and its rest.
FILLS = ("█", "░")
ASCII_FILLS = ("#", ".")
#: Stands for values that are not finite.
NOT_FINITE = "x"
FIGURE_WIDTH = 7
FIGURES = ("first", "last", "best")
#: A line of blocks that is narrower says nothing.
NARROWEST = 8
WIDEST_BAR = 60
TREND_WIDTH = NARROWEST + 3 * FIGURE_WIDTH


def sparkline(values: Sequence[float], width: int, blocks: str = BLOCKS) -> str:
    """Blocks from the lowest to the highest value; neighbours share a block, their mean, where there is no room."""
    means = [_mean_of_finite(part) for part in _parts(values, width)]
    finite = [mean for mean in means if math.isfinite(mean)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    steps = (len(blocks) - 1) / (high - low) if high > low else 0.0
    return "".join(blocks[round((m - low) * steps)] if math.isfinite(m) else NOT_FINITE for m in means)


def _parts(values: Sequence[float], width: int) -> Iterator[Sequence[float]]:
    """At most ``width`` runs of neighbours, alike in length."""
    count = min(width, len(values))
    for i in range(count):
        yield values[len(values) * i // count : len(values) * (i + 1) // count]


def _mean_of_finite(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


@dataclass(frozen=True)
class Trend:
    """A series: its line of blocks, and its first, last and best value below :func:`figure_names`.

    Attributes:
        shown: a value as text of less than FIGURE_WIDTH characters.
        best: ``min``, ``max``, or None where no value is better than another.
        is_logarithmic: the scale of the blocks, if all values are positive.
    """

    values: Sequence[float]
    shown: Callable[[float], str]
    best: Callable[[Sequence[float]], float] | None = None
    is_logarithmic: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        room = max(options.max_width - len(FIGURES) * FIGURE_WIDTH, 0)
        blocks = ASCII_BLOCKS if options.ascii_only else BLOCKS
        line = Text.assemble((sparkline(self._scaled(), room, blocks).ljust(room), "cyan"))
        line.no_wrap = True
        for figure, style in zip(self._figures(), ("dim", "bold", ""), strict=True):
            line.append(figure.rjust(FIGURE_WIDTH), style)
        yield line

    def _scaled(self) -> Sequence[float]:
        if not self.is_logarithmic or any(value <= 0 for value in self.values):
            return self.values
        return [math.log(value) if math.isfinite(value) else value for value in self.values]

    def _figures(self) -> tuple[str, str, str]:
        if not self.values:
            return "", "", ""
        finite = [value for value in self.values if math.isfinite(value)]
        best = self.shown(self.best(finite)) if self.best and finite else ""
        return self.shown(self.values[0]), self.shown(self.values[-1]), best


@dataclass(frozen=True)
class Heading:
    """What stands above trends."""

    text: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        figures = "".join(name.rjust(FIGURE_WIDTH) for name in FIGURES)
        room = max(options.max_width - len(figures), 0)
        title = Text(self.text, style="bold")
        title.truncate(room + 1, overflow="ellipsis")  # the first figure's name is shorter than its column
        names = figures.lstrip().rjust(options.max_width - len(title))
        line = Text.assemble(title, (names, "dim"))
        line.no_wrap = True
        yield line


@dataclass(frozen=True)
class Gauge:
    """A share as a bar, and a text behind it.

    Attributes:
        share: from 0 to 1; what is outside is cut.
        text_width: room for the text, the same for bars that stand above one another.
    """

    share: float
    text: str
    style: str
    text_width: int = 16

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        fill, rest = ASCII_FILLS if options.ascii_only else FILLS
        room = min(max(options.max_width - self.text_width - 1, NARROWEST), WIDEST_BAR)
        share = min(max(self.share, 0.0), 1.0) if math.isfinite(self.share) else 0.0
        filled = round(share * room)
        line = Text.assemble((fill * filled, self.style), (rest * (room - filled), "dim"), " ", self.text)
        line.no_wrap, line.overflow = True, "ellipsis"
        yield line
