"""The parts of a page: what they show, how it is read, and the same as numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np
import torch

from malora_dist.inspection.geometry import Geometry, Likeness, mean_of
from malora_dist.inspection.pictures import Picture, Table, curves, heatmaps
from malora_dist.inspection.routing import Routed
from malora_dist.inspection.sizes import Row
from malora_dist.inspection.source import Adapter
from malora_dist.methods.routing import STARVED_LOAD, effective_share, max_over_mean

#: What the sides are called: adjective, and what the experts do with the spaces.
_SIDES = {"down": ("down-projections", "read from"), "up": ("up-projections B", "write to")}


@dataclass(frozen=True)
class Section:
    """One part.

    Attributes:
        left_out: why something is not there, a sentence each.
        numbers: the same for JSON.
    """

    name: str
    title: str
    intro: str = ""
    pictures: Sequence[Picture] = ()
    table: Table | None = None
    left_out: Sequence[str] = ()
    numbers: dict[str, Any] = field(default_factory=dict)


def likeness_section(adapter: Adapter, geometry: Geometry | None) -> Section:
    """Paper figure 2."""
    title = "Are the experts alike?"
    if geometry is None:
        return Section("similarity", title, left_out=[_no_product(adapter)])
    intro = (
        "R²_CCA is the mean squared canonical correlation of two spaces: 1 where one contains the other, 0 where they "
        "have nothing in common. A number says something only above what random spaces have."
    )
    names = adapter.spec.projections
    pictures = [_pairs_picture(adapter, side, likeness) for side, likeness in geometry.likeness.items()]
    if pictures:
        panels = {_SIDES[side][0]: likeness.means for side, likeness in geometry.likeness.items()}
        table = _by_layer(adapter, list(panels), np.stack(list(panels.values()), axis=-1))
        pictures.append(
            Picture(
                "similarity_layers",
                "Similarity by layer",
                "Heatmap of the mean similarity of two experts, layers by projections.",
                "Mean over all pairs of experts: where a row or column is bright, the experts of that layer or "
                "projection are alike.",
                table,
                lambda: heatmaps(panels, "", "layer", "R²_CCA", (0.0, 1.0), column_names=[_short(n) for n in names]),
            )
        )
    reasons = geometry.left_out
    left_out = [f"Not compared: {_SIDES[side][0]}. {_sentence(reason)}" for side, reason in reasons.items()]
    if len(reasons) > 1 and len(set(reasons.values())) == 1:
        left_out = [f"Left out: {next(iter(reasons.values()))}."]
    numbers = {side: _likeness_numbers(adapter, likeness) for side, likeness in geometry.likeness.items()}
    return Section("similarity", title, intro if pictures else "", pictures, None, left_out, numbers)


def _pairs_picture(adapter: Adapter, side: str, likeness: Likeness) -> Picture:
    names = adapter.spec.projections
    what, verb = _SIDES[side]
    means, chances = mean_of(likeness.pairs, axis=0), mean_of(likeness.by_chance, axis=0)
    by_projection = mean_of(likeness.means, axis=0)
    reading = (
        f"Each cell compares two experts: bright if the spaces that they {verb} are the same, dark if they differ."
    )
    if likeness.within is not None:
        reading += (
            f" By declaration they all lie in one subspace; random spaces within it have {likeness.within:.2f}, so "
            "only more than that was learned."
        )
    rows = [[p, _text(by_projection[i]), _text(chances[i])] for i, p in enumerate(names)]
    return Picture(
        f"similarity_{side}",
        f"Similarity of the {what}, mean over the layers",
        f"Heatmaps, one per projection, of the similarity of every two experts' {what}; the table has their means.",
        f"{reading} Random spaces of these sizes have {_text(_mean(chances))}.",
        Table(["projection", "mean over pairs and layers", "by chance"], rows),
        lambda: heatmaps(dict(zip(names, means, strict=True)), "expert", "expert", "R²_CCA", (0.0, 1.0)),
    )


def _likeness_numbers(adapter: Adapter, likeness: Likeness) -> dict[str, Any]:
    return {
        "mean": _mean(likeness.means),
        "by_chance": _mean(likeness.by_chance),
        "by_chance_within_shared": likeness.within,
        "by_projection": dict(zip(adapter.spec.projections, mean_of(likeness.means, axis=0), strict=True)),
        "by_layer_and_projection": likeness.means,
        "pairs": likeness.pairs,
    }


def spectra_section(adapter: Adapter, geometry: Geometry | None) -> Section:
    """Paper figure 3."""
    title = "How many directions do they use?"
    if geometry is None:
        return Section("singular_values", title, left_out=[_no_product(adapter)])
    panels = {f"stacked {_SIDES[side][0]}": lines for side, lines in geometry.spectra.items()}
    rows = [
        [projection, what, str(len(sigma)), _text(sigma[0]), _text(sigma[-1]), _text(effective_rank(sigma))]
        for what, lines in panels.items()
        for projection, sigma in lines.items()
    ]
    shown = Picture(
        "singular_values",
        "Singular values of the stacked experts",
        "Curves of the singular values of the stacked down-projections and of the stacked B, a line per projection.",
        "Over their root mean square, mean over the layers. A flat line at 1: all rows point in directions of their "
        "own; a steep one: the experts share few directions; from where it is 0 on, there are no more.",
        Table(["projection", "matrices", "number", "largest", "smallest", "effective rank"], rows),
        lambda: curves(panels, "singular value", "over their root mean square"),
    )
    return Section("singular_values", title, pictures=[shown], numbers=dict(geometry.spectra))


def effective_rank(sigma: np.ndarray) -> float:
    """exp of the entropy of the squares: n for n equal singular values, 1 for a single one."""
    shares = np.square(sigma) / np.square(sigma).sum()
    return (
        float(np.exp(-(shares[shares > 0] * np.log(shares[shares > 0])).sum()))
        if np.isfinite(shares).all()
        else math.nan
    )


def norms_section(adapter: Adapter, geometry: Geometry | None) -> Section:
    """What each expert adds."""
    title = "How much does each add?"
    if geometry is None:
        return Section("norms", title, left_out=[_no_product(adapter)])
    names, norms = adapter.spec.projections, geometry.norms
    count = norms.shape[-1]
    if count > 1:
        panels = {p: norms[:, i] for i, p in enumerate(names)}
        columns, x = [], "expert"
    else:
        panels, columns, x = {"all projections": norms[..., 0]}, [_short(p) for p in names], ""
    reading = (
        "‖s B A‖ (Frobenius) of what an expert multiplies x with: bright ones change the base most, dark ones are idle."
    )
    if adapter.method.has_output():
        reading += f" {adapter.spec.method} rescales the sum of base and adapter afterwards, which is not in it."
    shown = Picture(
        "norms",
        "Norm of what is added to each linear",
        f"Heatmaps of the norm of what each expert adds, {'experts' if x else 'projections'} by layers.",
        reading,
        _by_layer(adapter, [f"expert {e}" for e in range(count)] if count > 1 else ["norm"], norms),
        lambda: heatmaps(panels, x, "layer", "‖s B A‖", column_names=columns),
    )
    return Section("norms", title, pictures=[shown], numbers={"by_layer_projection_expert": norms})


def routing_section(adapter: Adapter, routed: Routed | str) -> Section:
    """Which experts the tokens of the data take; a str says why this is left out."""
    title = "Who takes which tokens?"
    if isinstance(routed, str):
        return Section("routing", title, left_out=[routed])
    names, count, tasks = adapter.spec.projections, adapter.method.num_experts, list(routed.tasks)
    shares = routed.shares.mean(axis=0)
    columns = [f"expert {e}" for e in range(count)]
    topk = adapter.spec.topk
    even = f"An even router gives each expert {1 / count:.1%}."
    top = max(2 / count, float(shares.max()))  # even is at most half as bright as it gets
    pictures = [
        Picture(
            "routing_layers",
            "Share of the slots that each expert takes, by layer",
            "Heatmaps of the share of token slots per expert, layers by experts, one per projection.",
            f"Every token has {topk} slot{'s' * (topk > 1)}, every task the same weight. {even} A bright column: the "
            "expert takes most tokens; a black one: it starves.",
            _by_layer(adapter, columns, shares),
            lambda: heatmaps(
                {p: shares[:, i] for i, p in enumerate(names)}, "expert", "layer", "share of slots", (0.0, top)
            ),
        )
    ]
    pictures.append(_tasks_picture(adapter, routed))
    if len(tasks) > 1:
        pictures.append(_information_picture(adapter, routed))
    samples = ", ".join(f"{name} ({n} samples, {tokens:,} tokens)" for name, (n, tokens) in routed.tasks.items())
    numbers = {
        "tasks": {name: {"samples": n, "tokens": tokens} for name, (n, tokens) in routed.tasks.items()},
        "slots": routed.slots,
        "mutual_information_bits": routed.information,
        "site": routed.site,
    }
    intro = (
        f"One forward pass over {samples}. The table has means over the layers: the slots of the busiest expert over "
        "the mean, the number of experts in effect (exp of the entropy) of all, those with less than 5% of the "
        "mean, and what the expert tells of the task."
    )
    return Section("routing", title, intro, pictures, _balance_table(adapter, routed), numbers=numbers)


def _tasks_picture(adapter: Adapter, routed: Routed) -> Picture:
    """Of one layer each: the numbers of experts mean something in their own layer only."""
    tasks, telling = list(routed.tasks), routed.telling
    panels = {
        f"{p}, layer {layer}": routed.shares[:, layer, i]
        for i, (p, layer) in enumerate(zip(adapter.spec.projections, telling.argmax(axis=0).tolist(), strict=True))
    }
    top = max(2 / adapter.method.num_experts, *(float(values.max()) for values in panels.values()))
    which = "routing tells most of the task" if len(tasks) > 1 else "routing is least even"
    columns = [f"expert {e}" for e in range(adapter.method.num_experts)]
    rows = [[t, p, *map(_text, values[j])] for p, values in panels.items() for j, t in enumerate(tasks)]
    return Picture(
        "routing_tasks",
        "Share of the slots that each expert takes, by task",
        "Heatmaps of the share of token slots per expert, tasks by experts, one per projection.",
        f"Of every projection the layer where {which}. Rows that differ: routing tells the tasks apart; equal rows: it "
        "does not.",
        Table(["task", "where", *columns], rows),
        lambda: heatmaps(panels, "expert", "", "share of slots", (0.0, top), row_names=_cut(tasks)),
    )


def _information_picture(adapter: Adapter, routed: Routed) -> Picture:
    names, bits = adapter.spec.projections, routed.information
    most = math.log2(min(len(routed.tasks), adapter.method.num_experts))
    layer, projection = np.unravel_index(int(bits.argmax()), bits.shape)
    return Picture(
        "information",
        "How far routing separates the tasks",
        "Heatmap of the mutual information of task and expert in bits, layers by projections.",
        f"Mutual information of task and expert: 0 bits where all tasks are routed alike, {most:.2f} where the expert "
        f"tells the task. Highest: {names[int(projection)]} of layer {layer}, {bits.max():.3f} bits.",
        _by_layer(adapter, ["bits"], bits[..., None]),
        lambda: heatmaps({"all projections": bits}, "", "layer", "bits", column_names=[_short(p) for p in names]),
    )


def _balance_table(adapter: Adapter, routed: Routed) -> Table:
    shares = torch.from_numpy(routed.shares.mean(axis=0))  # [layers, projections, N]
    starved = (shares < STARVED_LOAD / shares.shape[-1]).double().mean(dim=(0, 2))
    rows = []
    for i, p in enumerate(adapter.spec.projections):
        loads = [max_over_mean(load_N) for load_N in shares[:, i]]
        effective = [effective_share(load_N) for load_N in shares[:, i]]
        bits = _text(routed.information[:, i].mean()) if len(routed.tasks) > 1 else "one task"
        rows.append(
            [p, f"{fmean(loads):.2f}", f"{max(loads):.2f}", f"{fmean(effective):.0%}", f"{starved[i]:.0%}", bits]
        )
    header = [
        "projection",
        "max/mean load",
        "in the worst layer",
        "effective experts",
        "starved",
        "bits about the task",
    ]
    return Table(header, rows)


def size_section(adapter: Adapter, rows: Sequence[Row], base_parameters: int | None) -> Section:
    """What it trains, beside the other methods."""
    own = rows[0].trained or 1
    table, left_out = [], []
    for row in rows:
        of_base = f"{row.trained / base_parameters:.2%}" if row.trained is not None and base_parameters else ""
        trained = "" if row.trained is None else f"{row.trained:,}"
        ratio = "" if row.trained is None else f"{row.trained / own:.2f}"
        equal = "none" if row.equal_rank is None else str(row.equal_rank)
        table.append([row.method, trained, ratio, equal, *([of_base] if base_parameters else [])])
        if row.problem:
            left_out.append(f"{row.method}: {row.problem}.")
    header = ["method", "trained", "over this adapter's", "lora_rank of equal size"]
    header += ["of the base"] if base_parameters else []
    intro = (
        f"Trained parameters of every method with this adapter's settings (lora_rank {adapter.spec.lora_rank}), and "
        "the largest lora_rank with which it trains no more than this adapter. The first row is this adapter."
    )
    numbers = {"methods": [row._asdict() for row in rows], "base_parameters": base_parameters}
    return Section("sizes", "How large is it?", intro, (), Table(header, table), left_out, numbers)


def _by_layer(adapter: Adapter, columns: Sequence[str], values: np.ndarray) -> Table:
    """Values [layers, projections, columns], a row per site."""
    sites = [(p, layer) for p in range(values.shape[1]) for layer in range(values.shape[0])]
    rows = [[adapter.spec.projections[p], str(layer), *map(_text, values[layer, p])] for p, layer in sites]
    return Table(["projection", "layer", *columns], rows)


def _no_product(adapter: Adapter) -> str:
    method = adapter.spec.method
    return f"Left out: by its declaration an expert of {method} is not a product of a down- and an up-projection."


def _mean(values: np.ndarray) -> float:
    return float(mean_of(values.reshape(-1), axis=0))


def _text(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) and abs(value) < 1000 else "" if math.isnan(value) else f"{value:.4g}"


def _short(projection: str) -> str:
    return projection.removesuffix("_proj")


def _cut(names: Sequence[str], length: int = 14) -> list[str]:
    return [name if len(name) <= length else f"{name[: length - 1]}…" for name in names]


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
