"""Tables 1 and 7: every method on tasks of different kinds, at equal parameter counts.

python tools/paper/inter_domain.py --jobs 2
python tools/paper/inter_domain.py --scale small --hf-model SMOLLM2 --data DATA --cells LoRA MoLoRA MALoRA
"""

from domain_tables import compare_methods

from malora_dist.errors import exit_on_user_error


@exit_on_user_error
def main() -> None:
    """Train, compare, write."""
    compare_methods("inter_domain", "Inter-domain: tasks of different kinds", __doc__ or "")


if __name__ == "__main__":
    main()
