"""The properties of tests/fuzzing.py, a few damages each; tools/torture.py runs them for minutes."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.fuzzing import PROPERTIES

#: How often a property is tried, where not 60 times: less if it loads a model each time, more if it is quick.
_TRIES = {"models_to_evaluate": 12, "adapters_to_evaluate": 12, "tokenizers": 30, "data_lines": 400, "data_arrays": 400}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PROPERTIES)
def test_nothing_but_the_projects_errors_leaves_a_reader(name: str) -> None:
    @settings(
        derandomize=True,
        phases=[Phase.generate],  # a smaller seed is no smaller damage
        max_examples=_TRIES.get(name, 60),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**32))
    def holds(seed: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            PROPERTIES[name](random.Random(seed), Path(folder))

    holds()
