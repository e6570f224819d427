"""Fields of config dataclasses that carry their help and their rules, and the one check that reads them.

    lr: float = key(3e-4, "peak learning rate", above=0)

A rule is written once, in the field: the check, the text of its error and docs/config.md follow from it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from malora_dist.errors import ConfigError

#: Whole numbers stay below this: torch and megatron keep many of them in 32 bits.
INT_LIMIT = 2**31


@dataclass(frozen=True)
class Rules:
    """What the value of a field has to satisfy; of a list, each of its entries.

    Attributes:
        choices: the values allowed; empty: any.
        minimum: the smallest number allowed.
        maximum: the largest number allowed.
        above: numbers have to be larger than this.
        below: numbers have to be smaller than this.
        required: a text must not be blank, a list not empty.
        cure: what to do about a wrong value; empty: the obvious.
    """

    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    required: bool = False
    cure: str = ""

    def is_too_low(self, number: float) -> bool:
        """Whether a number lies below the range."""
        return (self.minimum is not None and number < self.minimum) or (self.above is not None and number <= self.above)

    def is_too_high(self, number: float) -> bool:
        """Whether a number lies above the range."""
        return (self.maximum is not None and number > self.maximum) or (self.below is not None and number >= self.below)

    def range_text(self) -> str:
        """The numbers allowed, in words: ``at least 1``, ``in [0, 1)``; empty without a limit."""
        low = self.minimum if self.above is None else self.above
        high = self.maximum if self.below is None else self.below
        if low is not None and high is not None:
            return f"in {'[' if self.above is None else '('}{low}, {high}{']' if self.below is None else ')'}"
        if low is not None:
            return f"{'at least' if self.above is None else 'above'} {low}"
        if high is not None:
            return f"{'at most' if self.below is None else 'below'} {high}"
        return ""


def key(
    default: Any,
    help_text: str,
    *,
    choices: Sequence[str] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    required: bool = False,
    cure: str = "",
) -> Any:
    """A dataclass field with its help and its rules, see :class:`Rules`; a list as default is copied for each use."""
    rules = Rules(tuple(choices), minimum, maximum, above, below, required, cure)
    metadata = {"help": help_text, "rules": rules}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def rules_of(config_class: type, name: str) -> Rules:
    """The rules of one field."""
    (found,) = (f for f in dataclasses.fields(config_class) if f.name == name)
    return found.metadata.get("rules", Rules())


def check_fields(config: Any, prefix: str = "", of: type | None = None) -> None:
    """Check every field of a dataclass instance by its rules, and so on inside a list of dataclasses.

    Args:
        prefix: put before the keys in errors, ``data[0].`` for the fields of the first task.
        of: a class that it inherits from, whose fields are checked alone.

    Raises:
        ConfigError: the first value that breaks its field's rules, or a number that is not finite.
    """
    for f in dataclasses.fields(of or config):
        _check_value(prefix + f.name, getattr(config, f.name), rules_of(type(config), f.name))


def _check_value(name: str, value: Any, rules: Rules) -> None:
    if rules.required and not (value.strip() if isinstance(value, str) else value):
        raise ConfigError(name, value, "is required", rules.cure or "set it")
    if isinstance(value, str):
        _check_text(name, value)
    if isinstance(value, list):
        for i, entry in enumerate(value):
            if dataclasses.is_dataclass(entry):
                check_fields(entry, f"{name}[{i}].")
            else:
                _check_value(name, entry, rules)
    elif rules.choices and value not in rules.choices:
        rule = f"must be one of {', '.join(rules.choices)}"
        raise ConfigError(name, value, rule, rules.cure or "choose one of them")
    elif isinstance(value, int | float):
        _check_number(name, value, rules)


def _check_text(name: str, value: str) -> None:
    if value and not value.strip():
        raise ConfigError(name, value, "is blank", "write a text, or nothing")
    if "\0" in value or (not value.isascii() and value.encode(errors="replace") != value.encode(errors="ignore")):
        raise ConfigError(name, value, "holds what neither a file name nor UTF-8 can hold", "write it again")


def _check_number(name: str, value: float, rules: Rules) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(name, value, "must be a finite number", rules.cure or "write a number")
    if rules.is_too_low(value):
        raise ConfigError(name, value, f"must be {rules.range_text()}", rules.cure or "raise it")
    if rules.is_too_high(value):
        raise ConfigError(name, value, f"must be {rules.range_text()}", rules.cure or "lower it")
    if isinstance(value, int) and value >= INT_LIMIT:
        raise ConfigError(name, value, f"must be below {INT_LIMIT}", "lower it")
