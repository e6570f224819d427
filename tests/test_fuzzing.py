"""The properties of tests/fuzzing.py, a few damages each; tools/torture.py runs them for minutes."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzzing import PROPERTIES

#: Properties that load a model each time.
_SLOW = ("models_to_evaluate", "adapters_to_evaluate", "tokenizers")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PROPERTIES)
def test_nothing_but_the_projects_errors_leaves_a_reader(name: str) -> None:
    @settings(
        derandomize=True,
        max_examples=12 if name in _SLOW else 60,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**32))
    def holds(seed: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            PROPERTIES[name](random.Random(seed), Path(folder))

    holds()
