"""tools/soak.py: what counts as growth. The tool itself runs for minutes and is not part of the suite."""

from __future__ import annotations

import random
from types import ModuleType

import pytest

from tests.test_docs import tool


@pytest.fixture(scope="module")
def soak() -> ModuleType:
    return tool("soak")


def test_growth_is_that_of_the_whole_run(soak: ModuleType) -> None:
    line = soak.growth([100 + i for i in range(101)])
    assert (line.rise, line.standard_error) == (pytest.approx(100, rel=0.02), pytest.approx(0, abs=1e-9))
    warm = soak.growth([10, 80, *[100] * 98])
    assert (warm.mean, warm.rise) == (100, pytest.approx(0, abs=1e-9)), "what happens at the start does not count"
    rng = random.Random(0)
    found = [soak.growth([rng.gauss(0, 1) for _ in range(100)]) for _ in range(400)]
    certain = sum(abs(g.rise) > 2 * g.standard_error for g in found)
    assert 5 <= certain <= 40, "of noise, some 5% lie beyond two standard errors"


@pytest.mark.parametrize(
    ("figure", "values", "grows"),
    [
        ("threads", [9.0] * 100, False),
        ("threads", [9.0 + (i > 50) for i in range(100)], True),  # one more, for good
        ("threads", [9.0 + (i == 70) for i in range(100)], False),
        ("files", [9.0 + i / 50 for i in range(100)], True),
        ("MiB", [500 + i * 0.01 for i in range(100)], False),  # certain, and 1 MiB
        ("MiB", [500 + i * 0.2 for i in range(100)], True),
        ("MiB", [500 - i * 0.2 for i in range(100)], False),
        ("MiB", [500 + 100 * (i % 2) for i in range(100)], False),  # large swings, no growth
    ],
)
def test_what_grows(soak: ModuleType, figure: str, values: list[float], grows: bool) -> None:
    flat = {"MiB": 100.0, "threads": 3.0, "files": 10.0, "children": 0.0}
    line, found = soak.summary([[flat] * 100, [{**flat, figure: value} for value in values]])
    assert found == grows, line
    assert line.endswith(f"grows={figure if grows else 'none'}")
