"""The pictures of a page: each drawn once for a light and once for a dark screen, with its figures as a table."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_LIGHT = {"figure.facecolor": "#ffffff", "axes.facecolor": "#ffffff"}
_DARK = {
    "figure.facecolor": "#171b22",
    "axes.facecolor": "#20252e",
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), "#dfe4ea"),
}
_STYLE = {"text.parse_math": False, "font.size": 8, "axes.titlesize": 9, "axes.titlepad": 4, "image.cmap": "viridis"}
#: Colours that people with any colour vision tell apart (Okabe and Ito).
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999")
_DPI = 110
_COLUMNS = 4


@dataclass(frozen=True)
class Table:
    """The figures behind a picture."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A picture and what a reader needs.

    Attributes:
        name: of its PNG file.
        reading: a sentence that says how to read it.
        draw: makes it, in the colours that matplotlib is set to.
    """

    name: str
    title: str
    alt: str
    reading: str
    table: Table
    draw: Callable[[], Figure]


class Images(NamedTuple):
    """A picture as PNG files for a light and for a dark screen."""

    light: bytes
    dark: bytes


def images_of(picture: Picture) -> Images:
    """Draw it in both schemes, whatever the user's matplotlibrc says."""
    images = []
    first: Figure | None = None
    for scheme in (_LIGHT, _DARK):
        settings: Any = {**mpl.rcParamsDefault, **_STYLE, **scheme}
        with mpl.rc_context(settings):
            figure = picture.draw()
            if first is not None:  # finding the places of all axes takes as long as drawing
                figure.set_layout_engine("none")
                for axis, placed in zip(figure.axes, first.axes, strict=True):
                    axis.set_position(placed.get_position())
            stream = io.BytesIO()
            figure.savefig(stream, format="png", dpi=_DPI)
            images.append(stream.getvalue())
            first = figure
    return Images(*images)


def heatmaps(
    panels: Mapping[str, np.ndarray],
    x: str,
    y: str,
    colour: str,
    limits: tuple[float, float | None] = (0.0, None),
    row_names: Sequence[str] = (),
    column_names: Sequence[str] = (),
) -> Figure:
    """Matrices side by side in one scale of colours; NaN stays empty.

    Args:
        panels: {title: [rows, columns]}.
        x, y: what columns and rows are.
        colour: what the colour is.
        limits: of the scale; None: the largest value.
        row_names, column_names: default: their numbers.
    """
    rows, _ = next(iter(panels.values())).shape
    is_square = x == y  # experts by experts
    across = min(_COLUMNS, len(panels))
    down = math.ceil(len(panels) / across)
    height = 2.0 if is_square else min(2.6, max(1.35, 0.085 * rows + 0.6, 0.3 * len(row_names) + 0.7))
    width = min(4.2, max(2.0, 0.4 * len(column_names))) if len(panels) == 1 else 2.0
    figure = Figure(figsize=(across * width + (1.6 if row_names else 0.9), down * height + 0.3), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False)
    largest = max((float(np.nanmax(values)) for values in panels.values() if np.isfinite(values).any()), default=1.0)
    top = limits[1] if limits[1] is not None else (largest or 1.0)
    image: Any = None
    for axis, (title, values) in zip(axes.flat, panels.items(), strict=False):
        image = axis.imshow(values, aspect="auto", vmin=limits[0], vmax=top, interpolation="nearest")
        axis.set_title(title)
        _name(axis.xaxis, column_names)
        _name(axis.yaxis, row_names)
        axis.tick_params(length=2)
        if column_names and max(map(len, column_names)) > 2:
            axis.tick_params(axis="x", rotation=35)
    for index, axis in enumerate(axes.flat):  # only the outer ones carry words
        axis.set_visible(index < len(panels))
        if index % across == 0:
            axis.set_ylabel(y)
        else:
            axis.set_yticklabels([])
        if index + across >= len(panels):
            axis.set_xlabel(x)
    figure.colorbar(image, ax=list(axes.flat), label=colour, shrink=0.9, aspect=24, pad=0.015)
    return figure


def _name(axis: Any, names: Sequence[str]) -> None:
    if names:
        axis.set_ticks(range(len(names)), list(names))
    else:
        axis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def curves(panels: Mapping[str, Mapping[str, np.ndarray]], x: str, y: str) -> Figure:
    """Lines over their index, panels side by side.

    Args:
        panels: {title: {line: values}}.
    """
    figure = Figure(figsize=(1.0 + 3.6 * len(panels), 3.0), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for number, (name, values) in enumerate(lines.items()):
            colour, style = _COLOURS[number % len(_COLOURS)], ("-", "--", ":")[number % 3]
            axis.plot(np.arange(1, len(values) + 1), values, color=colour, linestyle=style, linewidth=1.4, label=name)
        axis.set_title(title)
        axis.set_xlabel(x)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
        axis.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axes[0].set_ylabel(y)
    axes[-1].legend(fontsize=7, facecolor=mpl.rcParams["axes.facecolor"])
    return figure
