"""Tables 1 and 7: every method on tasks of different kinds, at equal parameter counts.

python tools/paper/inter_domain.py --jobs 2
python tools/paper/inter_domain.py --scale small --hf-model SMOLLM2 --data DATA --cells LoRA MoLoRA MALoRA
"""

from domain_tables import main

if __name__ == "__main__":
    assert __doc__ is not None
    main("inter_domain", "Inter-domain: tasks of different kinds", __doc__)
