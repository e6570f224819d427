"""What the paper leaves open: gates renormalised over the kept experts or not, a router per projection or one for a
fused linear, and the balance factor (0.001 in its text, 0.01 in its tables).

    python tools/paper/open_questions.py --jobs 2

Renormalised gates are several times as large, so those rows are tuned by themselves; the others take the rate of
their method.
"""

from scales import paper_cells
from study import Study, build_parser
from variants import train_variants, variant_report

from malora_dist.errors import exit_on_user_error


@exit_on_user_error
def main() -> None:
    """Train, compare, write."""
    args = build_parser(__doc__ or "").parse_args()
    with Study(args, "Open questions") as study:
        domain = study.domain("inter_domain")
        methods = paper_cells(study.scale, domain)
        malora, molora = methods["MALoRA"], methods["MoLoRA"]
        cells = [
            malora,
            methods["MALoRA, renormalised"],
            malora.but("one router per fused linear", fuse_projections=True),
            malora.but("balance factor 0.001", aux_loss_coeff=0.001),
            malora.but("balance factor 0", aux_loss_coeff=0.0),
            methods["LoRA"],
            molora,
            molora.but("MoLoRA, renormalised", norm_topk_prob=True),
        ]
        as_malora = {name: malora for name in ("balance factor 0.001", "balance factor 0")}
        tuned, results = train_variants(study, domain, cells, as_malora)
    variant_report("open_questions", study, domain, cells, tuned, results, "MALoRA").write()


if __name__ == "__main__":
    main()
