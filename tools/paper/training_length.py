"""Not in the paper: does the order of the methods change when they train longer? Three times the steps of the scale.

    python tools/paper/training_length.py --jobs 2

Both lengths are tuned by themselves.
"""

from experiment import Cell, Domain
from scales import paper_cells
from study import Study, build_parser
from variants import train_variants, variant_report

from malora_dist.errors import exit_on_user_error

METHODS = ("LoRA", "MoLoRA", "MALoRA")
FACTOR = 3


def longer(cell: Cell, domain: Domain) -> Cell:
    """The same adapter, trained for more steps."""
    steps = FACTOR * domain.keys["train_iters"]
    return cell.but(f"{cell.name}, {FACTOR} x the steps", train_iters=steps, lr_warmup_iters=steps // 10)


@exit_on_user_error
def main() -> None:
    """Train, compare, write."""
    args = build_parser(__doc__ or "").parse_args()
    with Study(args, "Training length") as study:
        domain = study.domain("inter_domain")
        usual = [cell for name, cell in paper_cells(study.scale, domain).items() if name in METHODS]
        cells = [*usual, *(longer(cell, domain) for cell in usual)]
        tuned, results = train_variants(study, domain, cells)
    variant_report("training_length", study, domain, cells, tuned, results, cells[-1].name).write()


if __name__ == "__main__":
    main()
