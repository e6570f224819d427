"""Rules of config fields: each kind of rule refuses and says so, inside lists and nested dataclasses too."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

import pytest

from malora_dist.config import SECTIONS
from malora_dist.errors import ConfigError
from malora_dist.fields import Rules, check_fields, key, rules_of


@dataclass
class Inner:
    path: str = key("a", "", required=True, cure="name a file")
    share: float = key(1.0, "", above=0, maximum=1)


@dataclass
class Outer:
    count: int = key(1, "", minimum=1)
    rate: float = key(0.0, "", minimum=0, below=1, cure="0 is fine")
    limit: int = key(0, "", maximum=9)
    kind: str = key("x", "", choices=("x", "y"))
    parts: list[str] = key(["x"], "", choices=("x", "y"))
    inner: list[Inner] = key([Inner()], "", required=True)
    free: Any = None


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"count": 0}, "count=0: must be at least 1; raise it"),
        ({"count": 2**31}, "count=2147483648: must be below 2147483648; lower it"),
        ({"rate": 1.0}, "rate=1.0: must be in [0, 1); 0 is fine"),
        ({"rate": -0.5}, "rate=-0.5: must be in [0, 1); 0 is fine"),
        ({"rate": float("nan")}, "rate=nan: must be a finite number; 0 is fine"),
        ({"limit": 10}, "limit=10: must be at most 9; lower it"),
        ({"kind": "z"}, "kind='z': must be one of x, y; choose one of them"),
        ({"parts": ["x", "z"]}, "parts='z': must be one of x, y; choose one of them"),
        ({"inner": []}, "inner=[]: is required; set it"),
        ({"inner": [Inner(), Inner(path=" ")]}, "inner[1].path=' ': is required; name a file"),
        ({"inner": [Inner(share=0.0)]}, "inner[0].share=0.0: must be in (0, 1]; raise it"),
        ({"inner": [Inner(share=1.5)]}, "inner[0].share=1.5: must be in (0, 1]; lower it"),
    ],
)
def test_refused(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(expected)}$"):
        check_fields(Outer(**fields))


@pytest.mark.parametrize(
    "fields",
    [{}, {"count": 2**31 - 1}, {"rate": 0.999}, {"limit": 9}, {"parts": []}, {"inner": [Inner(share=1.0)]},
     {"free": {"any": None}}],
)  # fmt: skip
def test_admitted(fields: dict[str, Any]) -> None:
    check_fields(Outer(**fields))


def test_a_list_as_default_is_not_shared() -> None:
    Outer().parts.append("y")
    assert Outer().parts == ["x"]


def test_every_default_is_admitted_by_its_own_rules() -> None:
    """But for what is required and empty until it is set."""
    for section in SECTIONS:
        required = [f.name for f in dataclasses.fields(section) if rules_of(section, f.name).required]
        empty = [name for name in required if not getattr(section(), name)]
        check_fields(section(**{name: "x" for name in empty}))


def test_a_field_without_rules_has_none() -> None:
    assert rules_of(Outer, "free") == Rules()
