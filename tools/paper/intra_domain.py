"""Tables 2 and 7: every method on tasks of one kind, at equal parameter counts.

python tools/paper/intra_domain.py --jobs 2
python tools/paper/intra_domain.py --scale small --hf-model SMOLLM2 --data DATA --cells LoRA MoLoRA MALoRA
"""

from domain_tables import main

if __name__ == "__main__":
    assert __doc__ is not None
    main("intra_domain", "Intra-domain: tasks of one kind", __doc__)
