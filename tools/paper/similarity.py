"""Figures 2 and 3: how alike the down-projections A of experts are, and how alike their up-projections B.

    python tools/paper/similarity.py --jobs 2

Compared are LoRAs of one task and different seeds, LoRAs of different tasks, and the experts of one MoLoRA or MALoRA
that was trained on all tasks. The runs are those of inter_domain.py. After it, at the scale tiny, only MoLoRA and
MALoRA are trained again, to keep their parameters; at the others the LoRAs too. The measure is R^2_CCA
(malora_dist/inspection/subspaces.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations, pairwise
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch
from bootstrap import Interval, over_seeds
from domain_tables import single_tasks
from experiment import TARGETS, Cell, Domain, Run
from report import COLOURS, Report
from scales import paper_cells
from study import Study, build_parser, settings
from subspaces import Factors, Site, read_factors
from torch import Tensor

from malora_dist.errors import exit_on_user_error
from malora_dist.inspection.subspaces import Overlap, basis, overlap, spectrum

Adapter = Mapping[Site, Factors]
#: What of an expert is compared: its name in the tables, and its matrix [experts, r, width].
KINDS: Mapping[str, Callable[[Factors], Tensor]] = {
    "A": lambda factors: factors.down,
    "A, learned": lambda factors: factors.learned,
    "B": lambda factors: factors.up,
}
NOTES = """\
R^2_CCA: the mean squared canonical correlation of the row spaces of two A (for MALoRA of two P_t S), or of the column
spaces of two B. "by chance" is the exact mean for random spaces of these ranks and widths, max(p, q) / width: at small
widths it is not small, and a similarity says something only above it. Means over pairs, projections and layers; the
intervals are over seeds, and one seed has none.

A starts at random, and the start depends on seed, layer, projection and expert, but not on the task. LoRAs of one seed
start with the same A, so that their A resemble one another however little the tasks have in common. "A, learned" is A
after training minus the multiple of its start that is nearest to it, so that it is free of that and of weight decay.
LoRAs of different seeds, and the experts of one mixture, start independently: there a similarity of A above chance was
learned. B starts at zero everywhere.

All rows of MALoRA's P_t S lie in the d rows of S. Random spaces within these have the similarity of the column "by
chance within S", and the stacked P_t S have no more than d singular values."""


class Likeness(NamedTuple):
    """Of one seed: {(kind, projection): mean over pairs and layers}."""

    found: dict[tuple[str, str], Overlap]

    def of(self, kind: str) -> Overlap:
        """Mean over the projections."""
        return mean_overlap(overlaps for (k, _), overlaps in self.found.items() if k == kind)


def mean_overlap(overlaps: Iterable[Overlap]) -> Overlap:
    """Of those that there are."""
    table = np.array(list(overlaps))
    return Overlap(*(float(value) for value in np.nanmean(table, axis=0)))


def bases_of(adapter: Adapter) -> dict[tuple[str, Site], list[Tensor]]:
    """{(kind, site): a basis of each expert's space}."""
    return {
        (kind, site): [basis(matrix) for matrix in matrices(factors)]
        for site, factors in adapter.items()
        for kind, matrices in KINDS.items()
    }


Bases = Mapping[tuple[str, Site], Sequence[Tensor]]


def compare_pairs(pairs: Sequence[tuple[Bases, Bases]]) -> Likeness:
    """Single experts against each other."""
    return _likeness(pairs[0][0], lambda key: ((one[key][0], other[key][0]) for one, other in pairs))


def compare_experts(experts: Bases) -> Likeness:
    """All experts of one mixture against each other."""
    return _likeness(experts, lambda key: combinations(experts[key], 2))


def _likeness(keys: Bases, pairs: Callable[[tuple[str, Site]], Iterable[tuple[Tensor, Tensor]]]) -> Likeness:
    by_projection: dict[tuple[str, str], list[Overlap]] = {}
    for key in keys:
        kind, site = key
        by_projection.setdefault((kind, site.projection), []).extend(overlap(*pair) for pair in pairs(key))
    return Likeness({key: mean_overlap(overlaps) for key, overlaps in by_projection.items()})


def single_groups(single: Sequence[Sequence[Bases]]) -> dict[str, list[Likeness]]:
    """Groups of LoRAs of one task each: a likeness per seed, or per pair of neighbouring seeds.

    Args:
        single: of every seed the tasks in one order.
    """
    neighbours = list(pairwise(single))
    groups = {
        "same task, other seed": [
            compare_pairs(list(zip(one, other, strict=True))) for one, other in neighbours
        ],
        "other task, same seed": [compare_pairs(list(combinations(tasks, 2))) for tasks in single],
        "other task, other seed": [
            compare_pairs([(one[i], other[j]) for i, j in combinations(range(len(one)), 2)])
            for one, other in neighbours
        ],
    }  # fmt: skip
    return {name: found for name, found in groups.items() if found}  # one seed has no neighbour


def adapters_of(study: Study, domain: Domain, cell: Cell, lr: float) -> Iterator[Adapter]:
    """Of every seed."""
    for seed in study.scale.seeds:
        run = Run(domain, cell, lr, seed)
        yield read_factors(study.adapter_file(run), run)


def chance_within_shared(cell: Cell, adapters: Sequence[Adapter]) -> float | None:
    """Similarity of random spaces of the experts' rank within the span of S; None without S."""
    factors = next(iter(adapters[0].values()))
    return None if factors.shared is None else min(1.0, cell.keys["lora_rank"] / len(factors.shared))


def learned_share(adapters: Sequence[Adapter]) -> float:
    """Mean over sites, experts and seeds."""
    return fmean(factors.learned_share for adapter in adapters for factors in adapter.values())


def likeness_tables(report: Report, groups: Mapping[str, Sequence[Likeness]], within: Mapping[str, float]) -> None:
    """Figure 2: over all projections with intervals, then by projection."""
    header = ["", *(text for kind in KINDS for text in (f"{kind} [95%]", "by chance")), "A by chance within S"]
    rows, per_projection = [], []
    for name, seeds in groups.items():
        cells = []
        for kind in KINDS:
            interval, by_chance = interval_of(seeds, kind)
            cells += [interval.text(3, signed=False), f"{by_chance:.3f}"]
        rows.append([name, *cells, f"{within[name]:.3f}" if name in within else ""])
        for kind in KINDS:
            found = [mean_overlap(one.found[kind, projection] for one in seeds) for projection in TARGETS]
            per_projection.append([f"{name}: {kind}", *(f"{one.found:.3f} ({one.by_chance:.3f})" for one in found)])
    report.table("Figure 2: similarity", header, rows)
    report.table("Similarity by projection (by chance)", ["", *TARGETS], per_projection)


def interval_of(seeds: Sequence[Likeness], kind: str) -> tuple[Interval, float]:
    """(similarity, by chance) over all projections."""
    overlaps = [one.of(kind) for one in seeds]
    return over_seeds([one.found for one in overlaps]), fmean(one.by_chance for one in overlaps)


def mean_spectra(adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    """Singular values of the stacked matrices of a site's experts, mean over sites and seeds. [experts * r]"""
    stacks = {"A": KINDS["A"], "B": KINDS["B"], "A at its start": lambda factors: factors.start}
    every = [factors for adapter in adapters for factors in adapter.values()]
    return {name: torch.stack([spectrum(of(factors)) for factors in every]).mean(dim=0) for name, of in stacks.items()}


def spectrum_table(report: Report, spectra: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Figure 3 in figures."""
    rows = []
    for method, by_kind in spectra.items():
        for kind, sigma in by_kind.items():
            third = sigma[: max(1, round(len(sigma) / 3))]
            share = float(third.square().sum() / sigma.square().sum())
            rows.append([f"{method}: {kind}", len(sigma), f"{sigma[0]:.2f}", f"{sigma[-1]:.2f}", f"{share:.0%}"])
    rows += [["paper: A", "", "2.75", "0.25", ""], ["paper: B", "", "1.25", "0.75", ""]]
    header = ["", "number", "largest", "smallest", "squares in the largest third"]
    report.table("Figure 3: singular values of the stacked experts, over their root mean square", header, rows)


def pictures(
    report: Report, groups: Mapping[str, Sequence[Likeness]], spectra: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Left: similarity, a mark for chance. Right: spectra."""
    _, (left, right) = report.figure(columns=2)
    width = 0.8 / len(KINDS)
    for i, (kind, colour) in enumerate(zip(KINDS, COLOURS, strict=False)):
        found = [interval_of(seeds, kind) for seeds in groups.values()]
        x = np.arange(len(groups)) + (i - 1) * width
        values = np.array([interval for interval, _ in found])
        errors = np.abs(values[:, 1:].T - values[:, 0])
        left.bar(x, values[:, 0], width, yerr=errors, color=colour, label=kind)
        left.hlines([chance for _, chance in found], x - width / 2, x + width / 2, color="black", linewidth=1.5)
    left.set_xticks(range(len(groups)), list(groups), rotation=25, ha="right", fontsize=8)
    left.set_title("similarity; black: by chance", fontsize=9)
    for (method, by_kind), line in zip(spectra.items(), ("-", "--"), strict=True):
        for (kind, sigma), colour in zip(by_kind.items(), (COLOURS[0], COLOURS[2], COLOURS[6]), strict=True):
            right.plot(np.linspace(0, 1, len(sigma)), sigma, line, color=colour, label=f"{method}: {kind}")
    right.set_title("singular values of the stacked experts", fontsize=9)
    for axis in (left, right):
        axis.grid(axis="y", alpha=0.3)
        axis.legend(fontsize=7)


@exit_on_user_error
def main() -> None:
    """Train, compare, write."""
    args = build_parser(__doc__ or "").parse_args()
    with Study(args, "Similarity of experts") as study:
        domain = study.domain("inter_domain")
        cells = paper_cells(study.scale, domain)
        mixtures = [cells["MoLoRA"], cells["MALoRA"]]
        tuned = study.tune(domain, [*mixtures, cells["LoRA"]])
        _, rates = single_tasks(study, domain, cells["LoRA"], tuned["LoRA"], keeps_adapter=True)
        study.train(domain, mixtures, tuned, keeps_adapter=True)
    by_task = [list(adapters_of(study, domain.only(name), cells["LoRA"], one.lr)) for name, one in rates.items()]
    moved = {"LoRA, one task each": learned_share([adapter for of_task in by_task for adapter in of_task])}
    groups = single_groups([[bases_of(adapter) for adapter in of_seed] for of_seed in zip(*by_task, strict=True)])
    within, spectra = {}, {}
    for cell in mixtures:
        adapters = list(adapters_of(study, domain, cell, tuned[cell.name].lr))
        name = f"experts of one {cell.name}"
        groups[name] = [compare_experts(bases_of(adapter)) for adapter in adapters]
        spectra[cell.name] = mean_spectra(adapters)
        moved[cell.name] = learned_share(adapters)
        chance = chance_within_shared(cell, adapters)
        within |= {} if chance is None else {name: chance}
    report = Report("similarity", study.title, study.out, settings(study))
    report.say(NOTES)
    likeness_tables(report, groups, within)
    rows = [[name, f"{share:.1%}"] for name, share in moved.items()]
    report.table("Of the squares of A, what was learned; the rest is its start", ["", "share"], rows)
    spectrum_table(report, spectra)
    pictures(report, groups, spectra)
    report.keep(
        similarity={name: {kind: interval_of(seeds, kind) for kind in KINDS} for name, seeds in groups.items()},
        chance_within_shared=within,
        learned_share=moved,
        spectra={method: {kind: s.tolist() for kind, s in by_kind.items()} for method, by_kind in spectra.items()},
        ranks={name: cells[name].keys["lora_rank"] for name in ("LoRA", "MoLoRA", "MALoRA")},
    )
    report.write()


if __name__ == "__main__":
    main()
