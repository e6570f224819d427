"""Tables 2 and 7: every method on tasks of one kind, at equal parameter counts.

python tools/paper/intra_domain.py --jobs 2
python tools/paper/intra_domain.py --scale small --hf-model SMOLLM2 --data DATA --cells LoRA MoLoRA MALoRA
"""

from domain_tables import compare_methods

from malora_dist.errors import exit_on_user_error


@exit_on_user_error
def main() -> None:
    """Train, compare, write."""
    compare_methods("intra_domain", "Intra-domain: tasks of one kind", __doc__ or "")


if __name__ == "__main__":
    main()
