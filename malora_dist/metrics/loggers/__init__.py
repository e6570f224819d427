"""Where a run's figures go: one file for each logger; base.py has what they share."""
