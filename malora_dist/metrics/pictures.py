"""Tables of figures drawn as heatmaps.

Tables of one kind, whose tags differ in the last part only, are panels of one picture. What is relative to an even
load has colours around 1, the same in every picture, so that those of several steps and runs can be compared.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from malora_dist.metrics.report_file import Table

#: Loads from 1 / this to times an even one have a colour of their own.
_FARTHEST = 4.0
_DPI = 80
#: Most columns of a panel; of more, neighbours within a layer are drawn as one.
_MOST_COLUMNS = 1024
_LONGEST_NAME = 16
# Inches.
_CELL = 0.2
_MARGIN = 0.15
_LINE = 0.25
_LETTER = 0.085


@dataclass(frozen=True)
class _Kind:
    """How tables of one kind are drawn.

    Attributes:
        title, rows, columns: what they show.
        panels_in_a_row: side by side.
        is_relative: to an even load; otherwise the numbers are not below 0.
        has_layers: the columns are called ``LAYER.EXPERT``.
    """

    title: str
    rows: str
    columns: str
    panels_in_a_row: int
    is_relative: bool = True
    has_layers: bool = False


_KINDS = {
    "malora/load": _Kind("load of each expert over an even load", "layer", "expert", 4),
    "malora/load of tasks": _Kind("load of each expert by task over an even load", "", "layer", 1, has_layers=True),
    "malora/task information": _Kind("bits that a token's expert tells about its task", "", "layer", 1, False),
}


def draw(tables: Mapping[str, Table], caption: str) -> dict[str, bytes]:
    """Pictures of tables.

    Args:
        tables: {tag: table}; one of no known kind is left out.
        caption: for all of them, for example the iteration.

    Returns:
        {"pictures/" and what they show: PNG}; TensorBoard wants tags that no scalar has.
    """
    pictures = {}
    for tag, kind in _KINDS.items():
        panels = {name[len(tag) + 1 :]: table for name, table in tables.items() if name.startswith(f"{tag}/")}
        if tag in tables:
            panels[""] = tables[tag]
        if panels:
            pictures[f"pictures/{tag.removeprefix('malora/')}"] = _picture(kind, panels, caption)
    return pictures


def _narrow(kind: _Kind, table: Table) -> Table:
    """Of a table with too many columns, the largest of so many neighbours that what is left has room."""
    if not kind.has_layers or len(table.columns) <= _MOST_COLUMNS:
        return table
    layers = len({_layer(name) for name in table.columns})
    experts = len(table.columns) // layers
    least = math.ceil(len(table.columns) / _MOST_COLUMNS)
    width = next((n for n in range(least, experts) if experts % n == 0), experts)
    values = np.array(table.values).reshape(len(table.rows), -1, width).max(axis=2)
    return Table(table.rows, table.columns[::width], values.tolist())


def _layer(column: str) -> str:
    return column.rpartition(".")[0]


def _picture(kind: _Kind, panels: Mapping[str, Table], caption: str) -> bytes:
    asked = next(iter(panels.values()))
    panels = {name: _narrow(kind, table) for name, table in panels.items()}
    first = next(iter(panels.values()))
    neighbours = len(asked.columns) // len(first.columns)
    largest = f", the largest of {neighbours} neighbours" if neighbours > 1 else ""
    title = f"{kind.title}{largest}, {caption}"
    across = min(kind.panels_in_a_row, len(panels))
    down = math.ceil(len(panels) / across)
    widest = _MOST_COLUMNS / _DPI if across == 1 else _MOST_COLUMNS / _DPI / 4
    width, height = _clip(_CELL * len(first.columns), 1.6, widest), _clip(_CELL * len(first.rows), 0.4, 6.0)
    left = _LETTER * max(len(_short(name)) for name in first.rows) + (2 if kind.rows else 1) * _MARGIN
    right, top, bottom = 0.8, 2.2 * _LINE, 1.8 * _LINE  # on the right the colour bar
    gap, line_gap = _MARGIN, 1.8 * _LINE if kind.panels_in_a_row > 1 else _LINE
    total_width = max(left + across * width + (across - 1) * gap + right, _LETTER * len(title))
    total_height = top + down * height + (down - 1) * line_gap + bottom
    figure = Figure(figsize=(total_width, total_height), dpi=_DPI)
    place = {
        "left": left / total_width,
        "right": (left + across * width + (across - 1) * gap) / total_width,
        "top": 1 - top / total_height,
        "bottom": bottom / total_height,
        "wspace": gap / width,
        "hspace": line_gap / height,
    }
    grid = list(figure.subplots(down, across, squeeze=False, gridspec_kw=place).flat)
    figure.text(_MARGIN / total_width, 1 - _MARGIN / total_height, title, va="top", fontsize=10)
    norm = _norm(kind, panels.values())
    for i, (axes, (name, table)) in enumerate(zip(grid, panels.items(), strict=False)):
        axes.set_title(name, fontsize=9, pad=3)
        image = _heatmap(axes, kind, table, norm)
        _name_axes(axes, kind, table, is_leftmost=i % across == 0, is_lowest=i >= len(panels) - across)
    for axes in grid[len(panels) :]:
        axes.remove()
    _colour_bar(figure, image, kind, place["right"] + _MARGIN / total_width, 0.12 / total_width)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _norm(kind: _Kind, tables: Iterable[Table]) -> Normalize:
    """From numbers to colours; the scale of what is not relative moves in steps of 2, to be alike in most pictures."""
    if kind.is_relative:
        return LogNorm(1 / _FARTHEST, _FARTHEST)
    values = itertools.chain.from_iterable(itertools.chain.from_iterable(table.values for table in tables))
    largest = max(filter(math.isfinite, values), default=0.0)
    return Normalize(0, 2.0 ** math.ceil(math.log2(max(largest, 2**-6))))


def _heatmap(axes: Axes, kind: _Kind, table: Table, norm: Normalize) -> AxesImage:
    """Colours of the numbers; black: an expert without any token, which the scale's logarithm masks, and NaN."""
    colours = colormaps["RdBu_r" if kind.is_relative else "viridis"].with_extremes(bad="black")
    image = axes.imshow(table.values, colours, norm, aspect="auto", interpolation="nearest")
    if kind.has_layers:
        layers = [_layer(name) for name in table.columns]
        borders = [i - 0.5 for i in range(1, len(layers)) if layers[i] != layers[i - 1]]
        axes.vlines(borders, -0.5, len(table.rows) - 0.5, colors="black", linewidth=1)
    return image


def _name_axes(axes: Axes, kind: _Kind, table: Table, is_leftmost: bool, is_lowest: bool) -> None:
    """Names at the left and lowest panels; of many, some. Ticks are most of the work, so the others have none."""
    axes.tick_params(labelsize=8, length=2, pad=2)
    axes.set_yticks([])
    axes.set_xticks([])
    if is_leftmost:
        rows = range(0, len(table.rows), _step(len(table.rows), axes.bbox.height, 11))
        names = [_short(table.rows[i]) for i in rows]
        axes.set_yticks(rows, names, parse_math=False)  # a task's name may hold $
        axes.set_ylabel(kind.rows, fontsize=8, labelpad=2)
    if is_lowest:
        names = list(dict.fromkeys(map(_layer, table.columns))) if kind.has_layers else table.columns
        width = len(table.columns) / len(names)
        columns = range(0, len(names), _step(len(names), axes.bbox.width, 20))
        axes.set_xticks([i * width + (width - 1) / 2 for i in columns], [names[i] for i in columns])
        axes.set_xlabel(kind.columns, fontsize=8, labelpad=1)


def _colour_bar(figure: Figure, image: AxesImage, kind: _Kind, left: float, width: float) -> None:
    """Beside all panels.

    Args:
        left, width: its place, as parts of the figure's width.
    """
    place = figure.axes[0].get_position()
    low = figure.axes[-1].get_position().y0
    bar = figure.add_axes((left, low, width, place.y1 - low))
    colours = figure.colorbar(image, cax=bar, extend="both" if kind.is_relative else "neither")
    bar.tick_params(labelsize=8)
    if kind.is_relative:
        colours.set_ticks([0.25, 0.5, 1, 2, 4], labels=["1/4", "1/2", "1", "2", "4"], minor=False)
        colours.minorticks_off()


def _step(names: int, pixels: float, each: float) -> int:
    """Every how many-th name there is room for."""
    room = max(pixels / each, 1)
    return next(step for step in itertools.chain((1, 2, 4, 5, 8), itertools.count(10, 10)) if names <= step * room)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def _clip(number: float, low: float, high: float) -> float:
    return min(max(number, low), high)
