"""Figure 4a and table 11: MoLoRA and MALoRA from low to high rank, MALoRA's beta growing with it as in the paper.

    python tools/paper/ranks.py --jobs 2

Every rank is tuned by itself.
"""

from __future__ import annotations

from comparison import averages, pair_table
from experiment import Cell
from pictures import over_size
from scales import Scale, adapter_keys
from study import Study, build_parser
from variants import train_variants, variant_report

from malora_dist.errors import exit_on_user_error

#: The paper's MoLoRA ranks, and the MALoRA (rank, d, beta) of about the same size.
MOLORA = (4, 8, 16, 32)
MALORA = ((6, 16, 0.3), (12, 32, 1.0), (24, 64, 3.5), (48, 128, 5.0))


def molora_cells(scale: Scale) -> list[Cell]:
    """A cell per rank."""
    return [Cell(f"MoLoRA r {r}", adapter_keys("molora", r)) for r in map(scale.rank, MOLORA)]


def malora_cells(scale: Scale) -> list[Cell]:
    """Likewise; half of the smallest rank is rounded up, so that d stays the larger."""
    cells = []
    for rank, shared, beta in MALORA:
        r, d = scale.rank(rank), scale.rank(shared)
        keys = adapter_keys("malora", r, shared_dim=d, beta=beta)
        cells.append(Cell(f"MALoRA r {r}, d {d}, beta {beta:g}", keys))
    return cells


@exit_on_user_error
def main() -> None:
    """Train, compare, write."""
    args = build_parser(__doc__ or "").parse_args()
    with Study(args, "Ranks") as study:
        domain = study.domain("inter_domain")
        by_method = {"MoLoRA": molora_cells(study.scale), "MALoRA": malora_cells(study.scale)}
        cells = [cell for of_method in by_method.values() for cell in of_method]
        tuned, results = train_variants(study, domain, cells)
    report = variant_report("ranks", study, domain, cells, tuned, results, by_method["MALoRA"][-1].name)
    same_size = [(ma.name, mo.name) for mo, ma in zip(by_method["MoLoRA"], by_method["MALoRA"], strict=True)]
    pair_table(report, "MALoRA minus MoLoRA of about the same size", results, same_size)
    smaller = [(ma.name, mo.name) for ma, mo in zip(by_method["MALoRA"][1:], by_method["MoLoRA"][2:], strict=False)]
    pair_table(report, "MALoRA minus a MoLoRA of nearly twice the size", results, smaller)
    over_size(report, domain, by_method, averages(results))
    report.write()


if __name__ == "__main__":
    main()
