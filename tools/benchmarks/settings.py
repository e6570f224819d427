"""What the benchmarks compare: each method at the ranks of a setting, as config keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from malora_dist.methods.spec import PROJECTIONS, AdapterSpec


@dataclass(frozen=True)
class Setting:
    """One rank per method, 8 experts of which a token takes 2, alpha twice the rank.

    Attributes:
        ranks: {method: its `lora_rank`}; the methods not named are not compared.
    """

    ranks: Mapping[str, int]
    shared_dim: int
    target_modules: tuple[str, ...]

    def keys(self, method: str) -> dict[str, Any]:
        """Config keys of a method, which the PEFT tuner knows by the same names."""
        rank = self.ranks[method]
        return {
            "method": method,
            "target_modules": list(self.target_modules),
            "lora_rank": rank,
            "lora_alpha": 2.0 * rank,
            "shared_dim": self.shared_dim,
            "num_lora_experts": 8,
            "topk": 2,
        }

    def overrides(self, method: str) -> list[str]:
        """The same as ``key=value``."""
        keys = self.keys(method) | {"target_modules": f"[{','.join(self.target_modules)}]"}
        return [f"{key}={value}" for key, value in keys.items()]

    def spec(self, method: str, **changes: Any) -> AdapterSpec:
        """The same as an adapter, with other values of some keys."""
        return AdapterSpec(**(self.keys(method) | changes))


SETTINGS = {
    # The paper's table 10: about as many trained parameters in every method, o_proj left out.
    "paper": Setting(
        ranks={"lora": 64, "asymmetric_lora": 128, "dora": 64, "molora": 8, "malora": 12},
        shared_dim=32,
        target_modules=tuple(projection for projection in PROJECTIONS if projection != "o_proj"),
    ),
    # Small adapters on every projection.
    "rank8": Setting(
        ranks={"lora": 8, "asymmetric_lora": 8, "dora": 8, "molora": 8, "malora": 10},
        shared_dim=10,
        target_modules=PROJECTIONS,
    ),
}
