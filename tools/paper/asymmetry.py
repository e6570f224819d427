"""Figure 5: LoRA and AsyLoRA, whose A is frozen at random, over the rank.

    python tools/paper/asymmetry.py --jobs 2

Every rank is tuned by itself. At equal ranks AsyLoRA trains half as much.
"""

from comparison import averages, pair_table
from experiment import Cell
from pictures import over_size
from scales import adapter_keys
from study import Study, build_parser
from variants import train_variants, variant_report

from malora_dist.errors import exit_on_user_error

RANKS = (8, 32, 128, 256)


@exit_on_user_error
def main() -> None:
    """Train, compare, write."""
    args = build_parser(__doc__ or "").parse_args()
    with Study(args, "Asymmetry") as study:
        domain = study.domain("intra_domain")
        by_method = {
            name: [Cell(f"{name} r {r}", adapter_keys(method, r)) for r in map(study.scale.rank, RANKS)]
            for name, method in (("LoRA", "lora"), ("AsyLoRA", "asymmetric_lora"))
        }
        cells = [cell for of_method in by_method.values() for cell in of_method]
        tuned, results = train_variants(study, domain, cells)
    report = variant_report("asymmetry", study, domain, cells, tuned, results, by_method["LoRA"][-1].name)
    same_rank = [(asy.name, lora.name) for lora, asy in zip(by_method["LoRA"], by_method["AsyLoRA"], strict=True)]
    pair_table(report, "AsyLoRA minus LoRA of the same rank", results, same_rank)
    over_size(report, domain, by_method, averages(results))
    report.write()


if __name__ == "__main__":
    main()
