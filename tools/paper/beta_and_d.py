"""Figure 4b and table 12: MALoRA over beta and the width d of the shared subspace, at about equal size.

    python tools/paper/beta_and_d.py --jobs 2

beta is a scale of the start: it makes P learn faster and S slower, so every pair of rank and d is tuned once, at
beta 1, and keeps that learning rate.
"""

from statistics import fmean

from comparison import averages
from experiment import Cell
from report import COLOURS, Report
from scales import Scale, adapter_keys
from study import Study, build_parser
from variants import train_variants, variant_report

from malora_dist.errors import exit_on_user_error

#: The paper's (rank, d): lambda 0.25, 0.5 and 0.75 of the rank rule.
WIDTHS = ((14, 16), (12, 32), (10, 48))
BETAS = (0.5, 1.0, 1.25, 2.0)


def cells_by_width(scale: Scale) -> dict[str, list[Cell]]:
    """{r and d: a cell per beta}."""
    found = {}
    for rank, shared in WIDTHS:
        r, d = scale.rank(rank), scale.rank(shared)
        widths = f"r {r}, d {d}"
        found[widths] = [
            Cell(f"{widths}, beta {beta:g}", adapter_keys("malora", r, shared_dim=d, beta=beta)) for beta in BETAS
        ]
    return found


def grid_table(report: Report, by_width: dict[str, list[Cell]], scores: dict[str, list[float]]) -> None:
    """The paper's table 12."""
    rows = [
        [widths, *(f"{sum(scores[cell.name]) / len(scores[cell.name]):.2f}" for cell in cells)]
        for widths, cells in by_width.items()
    ]
    report.table("Average over tests", ["", *(f"beta {beta:g}" for beta in BETAS)], rows)


def picture(report: Report, by_width: dict[str, list[Cell]], scores: dict[str, list[float]]) -> None:
    """Score over beta, a line per pair of widths."""
    _, axis = report.figure()
    for colour, (widths, cells) in zip(COLOURS, by_width.items(), strict=False):
        axis.plot(BETAS, [fmean(scores[cell.name]) for cell in cells], "o-", color=colour, label=widths)
    axis.set_xlabel("beta")
    axis.set_ylabel("average over tests")
    axis.grid(alpha=0.3)
    axis.legend()


@exit_on_user_error
def main() -> None:
    """Train, compare, write."""
    args = build_parser(__doc__ or "").parse_args()
    with Study(args, "beta and d") as study:
        domain = study.domain("intra_domain")
        by_width = cells_by_width(study.scale)
        cells = [cell for of_width in by_width.values() for cell in of_width]
        plain = {cell.name: of_width[BETAS.index(1.0)] for of_width in by_width.values() for cell in of_width}
        tuned, results = train_variants(study, domain, cells, plain)
        papers = list(by_width.values())[1][BETAS.index(1.25)]
    report = variant_report("beta_and_d", study, domain, cells, tuned, results, papers.name)
    grid_table(report, by_width, averages(results))
    picture(report, by_width, averages(results))
    report.write()


if __name__ == "__main__":
    main()
