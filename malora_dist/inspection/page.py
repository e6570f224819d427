"""One HTML page that needs nothing else: pictures and style are in it, it has no scripts, and all text is escaped."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from malora_dist.inspection.pictures import Images
from malora_dist.inspection.routing import ColouredSample, Routed
from malora_dist.inspection.sections import Section

#: (hue, saturation, lightness on a light screen, on a dark one); experts beyond them get hues between.
_HUES = (205, 38, 150, 325, 262, 16, 88, 180)


@dataclass(frozen=True)
class Colouring:
    """The coloured samples of one site.

    Attributes:
        why: a sentence on the choice of the site.
        shares: of the slots at the site, by expert, every task with the same weight.
    """

    layer: int
    projection: str
    why: str
    shares: Sequence[float]
    samples: Sequence[ColouredSample]


def colouring_of(routed: Routed, projections: Sequence[str], is_asked_for: bool) -> Colouring:
    """What the page colours.

    Args:
        is_asked_for: the user has named the site.
    """
    why = "This is where the expert tells most of the task."
    if is_asked_for or len(routed.tasks) == 1:
        why = "This is the site that was asked for." if is_asked_for else "This is where the fewest experts are in use."
    layer, projection = routed.site
    shares: np.ndarray = routed.shares[:, layer, projections.index(projection)].mean(axis=0)
    return Colouring(layer, projection, why, shares.tolist(), routed.samples)


def render(
    title: str,
    facts: Mapping[str, str],
    notes: Sequence[str],
    sections: Sequence[Section],
    images: Mapping[str, Images],
    colouring: Colouring | None,
    config: Mapping[str, Any],
) -> str:
    """The page.

    Args:
        facts: what the adapter is, in short.
        images: of the sections' pictures, by name.
        config: all settings.
    """
    environment = Environment(
        loader=PackageLoader("malora_dist.inspection", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"data_uri": data_uri, "basename": os.path.basename}
    count = len(colouring.shares) if colouring else 0
    return environment.get_template("page.html.jinja").render(
        title=title,
        facts=facts,
        notes=notes,
        sections=sections,
        images=images,
        colouring=colouring,
        hues=[hue_of(expert, count) for expert in range(count)],
        config=config,
    )


def data_uri(png: bytes) -> str:
    """A picture as the address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def hue_of(expert: int, count: int) -> int:
    """In degrees, far apart for few experts."""
    return _HUES[expert] if count <= len(_HUES) else round(360 * expert / count)
