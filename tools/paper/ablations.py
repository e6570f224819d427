"""Table 3: MALoRA with one of its parts taken away. Every row is tuned by itself.

python tools/paper/ablations.py --jobs 2
"""

from experiment import Cell
from scales import Scale, adapter_keys, paper_cells
from study import Study, build_parser
from variants import draw_averages, train_variants, variant_report

from malora_dist.errors import exit_on_user_error


def ablation_cells(scale: Scale, malora: Cell) -> list[Cell]:
    """The rows of the table, at the paper's ranks (divided)."""
    r8, r12, r16, d32, d64 = (scale.rank(width) for width in (8, 12, 16, 32, 64))
    return [
        malora,
        malora.but("no asymmetry", **adapter_keys("malora", r8, shared_dim=d64)),
        malora.but("P frozen", freeze=["P"]),
        Cell("B decomposed", adapter_keys("malora_b", r12, shared_dim=d32)),
        malora.but("S frozen", **adapter_keys("malora", r16, shared_dim=d32), freeze=["S"]),
        Cell("no shared S", adapter_keys("malora_unshared", r12, shared_dim=d32)),
        Cell("MoLoRA of its rank", adapter_keys("molora", r12)),
        Cell("MoLoRA, equal starts", adapter_keys("molora_equal_start", r12)),
    ]


@exit_on_user_error
def main() -> None:
    """Train, compare, write."""
    args = build_parser(__doc__ or "").parse_args()
    with Study(args, "Ablations") as study:
        domain = study.domain("inter_domain")
        cells = ablation_cells(study.scale, paper_cells(study.scale, domain)["MALoRA"])
        tuned, results = train_variants(study, domain, cells)
    report = variant_report("ablations", study, domain, cells, tuned, results, "MALoRA")
    draw_averages(report.figure()[1], results)
    report.write()


if __name__ == "__main__":
    main()
