"""From an adapter to a directory of pictures and a page."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from malora_dist.checkpoint.base import staged_directory
from malora_dist.errors import CheckpointError, ConfigError
from malora_dist.families.base import family_of, projection_widths
from malora_dist.families.shapes import base_parameters
from malora_dist.files import check_replaceable, resolved
from malora_dist.inspection.geometry import geometry_of
from malora_dist.inspection.page import colouring_of, render
from malora_dist.inspection.pictures import images_of
from malora_dist.inspection.routing import Routed, Samples, Site, Track, check_site, route_samples
from malora_dist.inspection.sections import (
    Section,
    likeness_section,
    norms_section,
    routing_section,
    size_section,
    spectra_section,
)
from malora_dist.inspection.sizes import size_table
from malora_dist.inspection.source import Adapter, read_adapter

PAGE = "inspection.html"
#: All that a directory of this tool may hold: with anything else in it, it is never replaced.
LAYOUT = frozenset(
    {PAGE}
    | {
        f"{name}.png"
        for name in (
            "similarity_down", "similarity_up", "similarity_layers", "singular_values", "norms", "routing_layers",
            "routing_tasks", "information",
        )
    }
)  # fmt: skip


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        path: a run's `save`, an `iter_*` directory, or a PEFT adapter.
        hf_model: the adapter's base; needed for data.
        data: files, a task each.
        layer, projection: of the site to colour tokens by; None: the one that tells most.
    """

    path: Path
    out: Path | None = None
    hf_model: Path | None = None
    data: Sequence[Path] = ()
    samples: Samples = field(default_factory=Samples)
    layer: int | None = None
    projection: str | None = None

    @property
    def target(self) -> Path:
        """`out`, or beside the adapter."""
        path = resolved(self.path)
        return resolved(self.out) if self.out is not None else path.with_name(f"{path.name}-inspection")

    def check(self) -> None:
        """Refuse options that do not go together.

        Raises:
            ConfigError: naming the option.
        """
        if self.data and self.hf_model is None:
            shown = " ".join(map(str, self.data))
            raise ConfigError("--data", shown, "runs the model", "name the adapter's base with --hf-model DIR")
        if (self.layer is None) != (self.projection is None):
            given = "--layer" if self.projection is None else "--projection"
            value = self.layer if self.projection is None else self.projection
            raise ConfigError(given, value, "names half of a site", "give both --layer and --projection, or neither")
        if self.layer is not None and not self.data:
            raise ConfigError("--layer", self.layer, "chooses what to colour of the data", "add --data FILE")

    @property
    def site(self) -> Site | None:
        """The site asked for."""
        return None if self.layer is None or self.projection is None else (self.layer, self.projection)


@dataclass(frozen=True)
class Inspection:
    """An adapter and all that is found out about it; nothing is drawn yet."""

    adapter: Adapter
    facts: Mapping[str, str]
    sections: Sequence[Section]
    routed: Routed | None

    @property
    def numbers(self) -> dict[str, Any]:
        """All numbers, ready for JSON."""
        about = {**self.facts, "settings": self.adapter.spec.adapter_fields()}
        return plain({"adapter": about, **{section.name: section.numbers for section in self.sections}})


def inspect_adapter(request: Request, track: Track) -> Inspection:
    """Find it all out.

    Args:
        track: shows how far a loop has come: (sequence, what it does) -> its items.

    Raises:
        MaloraError: what is asked for cannot be read, does not fit together, or the target holds something else.
    """
    request.check()
    check_replaceable(request.target, LAYOUT, also_part=True)
    adapter = read_adapter(request.path)
    if request.site is not None:
        check_site(adapter, request.site)
    base = None if request.hf_model is None else base_size(adapter, request.hf_model)
    geometry = geometry_of(adapter, lambda sites: track(sites, "compare experts"))
    routed = _route(adapter, request, track)
    sections = [
        routing_section(adapter, routed),
        likeness_section(adapter, geometry),
        spectra_section(adapter, geometry),
        norms_section(adapter, geometry),
        size_section(adapter, size_table(adapter), base),
    ]
    return Inspection(adapter, facts_of(adapter, base), sections, routed if isinstance(routed, Routed) else None)


def write_report(request: Request, inspection: Inspection, track: Track) -> Path:
    """Draw the pictures and write them and the page; its path.

    Raises:
        CheckpointError: ``request.target`` cannot be written, or holds something else.
    """
    adapter, sections, routed = inspection.adapter, inspection.sections, inspection.routed
    pictures = [picture for section in sections for picture in section.pictures]
    images = {picture.name: images_of(picture) for picture in track(pictures, "draw")}
    colouring = None
    if routed is not None:
        colouring = colouring_of(routed, adapter.spec.projections, request.site is not None)
    config = adapter.run or adapter.spec.adapter_fields()
    title = f"{adapter.spec.method} in {_place(request.path)}"
    page = render(title, inspection.facts, adapter.notes, sections, images, colouring, config)
    target = request.target
    try:
        with staged_directory(target, LAYOUT, also_part=True) as staging:
            for name, image in images.items():
                (staging / f"{name}.png").write_bytes(image.light)
            (staging / PAGE).write_text(page, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written ({error.strerror}); name another with --out") from error
    return target / PAGE


def _route(adapter: Adapter, request: Request, track: Track) -> Routed | str:
    if not adapter.method.is_mixture():
        return f"Left out: {adapter.spec.method} has no router, every token takes the same way."
    if not request.data or request.hf_model is None:
        return "Left out: routing needs tokens; name the base with --hf-model DIR and samples with --data FILE..."
    return route_samples(adapter, request.hf_model, request.data, request.samples, request.site, track)


def base_size(adapter: Adapter, hf_model: Path) -> int:
    """Parameters of the base.

    Raises:
        CheckpointError: the adapter does not fit it.
    """
    hf = family_of(hf_model).hf
    if hf.num_hidden_layers != adapter.num_layers:
        what = f"{hf.num_hidden_layers} layers, the adapter {adapter.num_layers}"
        raise CheckpointError(f"--hf-model {hf_model}: has {what}; name the base it was trained on")
    for projection, widths in adapter.widths.items():
        if (found := projection_widths(hf)[projection]) != widths:
            what = "{} of {} -> {}, the adapter one of {} -> {}".format(projection, *found, *widths)
            raise CheckpointError(f"--hf-model {hf_model}: has a {what}; name the base it was trained on")
    return base_parameters(hf)


def facts_of(adapter: Adapter, base_parameters: int | None) -> dict[str, str]:
    """What the adapter is and where it comes from, in words."""
    spec, method = adapter.spec, adapter.method
    widths = f"r {spec.lora_rank}"
    if method.uses("shared"):
        widths += f", d {spec.shared_dim}"
    facts = {"Method": (type(method).__doc__ or spec.method).strip().splitlines()[0]}
    if method.is_mixture():
        facts["Experts"] = f"{method.num_experts}, {spec.topk} per token"
    facts["Widths"] = f"{widths}, scaling s = {method.scaling:.3g}"
    facts["Adapted"] = f"{', '.join(spec.projections)} of {adapter.num_layers} layers"
    facts["Base"] = adapter.base_model_name_or_path or "not told"
    facts["Fingerprint of the base"] = adapter.base_fingerprint[:12] or "not told"
    if base_parameters is not None:
        facts["Parameters of the base"] = f"{base_parameters:,}"
    facts["Form"] = adapter.form
    if adapter.iteration is not None:
        facts["Iteration"] = str(adapter.iteration)
    facts["Files"] = adapter.condition
    if names := _data_names(adapter.run):
        facts["Trained on"] = ", ".join(names)
    facts["This page"] = f"made {datetime.date.today()} with torch {torch.__version__}"
    return facts


def _data_names(run: Mapping[str, Any]) -> list[str]:
    tasks = run.get("data")
    if not isinstance(tasks, list):
        return []
    return [str(task.get("name") or Path(str(task.get("path"))).stem) for task in tasks if isinstance(task, dict)]


def _place(path: Path) -> str:
    path = resolved(path)
    return f"{path.parent.name}/{path.name}" if path.parent.name else path.name


def plain(value: Any) -> Any:
    """What JSON knows: arrays as lists, NaN as null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
