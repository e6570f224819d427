"""What one adapter is: the method, its widths and its routing. No tensors here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from malora_dist.errors import ConfigError

METHODS = ("lora", "asymmetric_lora", "molora", "malora")

#: The seven linear projections of a Llama layer, by their Hugging Face names, and where
#: megatron-core keeps them: {megatron name: the projections fused into it, in fused order}.
MEGATRON_LINEARS: dict[str, tuple[str, ...]] = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}
PROJECTIONS: tuple[str, ...] = tuple(p for fused in MEGATRON_LINEARS.values() for p in fused)


@dataclass
class AdapterSpec:
    """Which adapter is put on which projections (one concept, four methods).

    ======================  ===========================================================
    method                  y = W0 x + ...
    ======================  ===========================================================
    ``lora``                s B A x
    ``asymmetric_lora``     s B A x with A frozen at its random start
    ``molora``              s sum_{t in topk} g_t(x) B_t A_t x
    ``malora``              s sum_{t in topk} g_t(x) B_t P_t (S_A x)
    ======================  ===========================================================
    """

    method: str = field(default="malora", metadata={"help": "`lora`, `asymmetric_lora`, `molora` or `malora`"})
    target_modules: list[str] = field(
        default_factory=lambda: list(PROJECTIONS),
        metadata={
            "help": "projections to adapt, by Hugging Face name (q_proj, ...) or megatron name (linear_qkv, ...)"
        },
    )
    lora_rank: int = field(default=8, metadata={"help": "r, PEFT's `r`"})
    lora_alpha: float = field(default=16.0, metadata={"help": "numerator of the scaling s = lora_alpha / lora_rank"})
    use_rslora: bool = field(default=False, metadata={"help": "s = lora_alpha / sqrt(lora_rank) instead (rsLoRA)"})
    lora_dropout: float = field(
        default=0.0, metadata={"help": "dropout on the input of S_A (or A); the router sees x undropped"}
    )
    num_lora_experts: int = field(default=8, metadata={"help": "N, experts per adapted projection (molora, malora)"})
    topk: int = field(default=2, metadata={"help": "k, experts per token (molora, malora)"})
    shared_dim: int = field(default=10, metadata={"help": "d, width of the shared subspace S_A x (malora)"})
    rank_expansion: float = field(
        default=1.25, metadata={"help": "beta; an expert's rank is r' = round(beta * lora_rank) (malora)"}
    )
    fuse_projections: bool = field(
        default=False,
        metadata={"help": "q, k, v share one router and down-projection, gate and up another; each keeps its own B"},
    )
    norm_topk_prob: bool = field(default=True, metadata={"help": "renormalise the kept gates to sum 1 when topk > 1"})
    aux_loss_coeff: float = field(
        default=0.01, metadata={"help": "load-balancing loss coefficient, per adapted projection"}
    )

    @property
    def is_mixture(self) -> bool:
        """Whether tokens are routed among experts."""
        return self.method in ("molora", "malora")

    @property
    def num_experts(self) -> int:
        """N; 1 for the methods without a router."""
        return self.num_lora_experts if self.is_mixture else 1

    @property
    def expert_rank(self) -> int:
        """Rank of one expert: r' = round(beta r) for MALoRA, r otherwise."""
        return round(self.rank_expansion * self.lora_rank) if self.method == "malora" else self.lora_rank

    @property
    def scaling(self) -> float:
        """s: alpha / r, or alpha / sqrt(r) with rsLoRA."""
        return self.lora_alpha / (math.sqrt(self.lora_rank) if self.use_rslora else self.lora_rank)

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of one adapter's parameters, in the order in which x meets them."""
        return {
            "lora": ("A", "B"),
            "asymmetric_lora": ("A", "B"),
            "molora": ("router", "A", "B"),
            "malora": ("router", "S", "P", "B"),
        }[self.method]

    @property
    def frozen_names(self) -> tuple[str, ...]:
        """Parameters that stay at their start."""
        return ("A",) if self.method == "asymmetric_lora" else ()

    @property
    def projections(self) -> tuple[str, ...]:
        """`target_modules` as Hugging Face projection names, in model order."""
        chosen: set[str] = set()
        for target in self.target_modules:
            chosen.update(MEGATRON_LINEARS.get(target, (target,)))
        return tuple(p for p in PROJECTIONS if p in chosen)

    @property
    def adapter_groups(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """The adapters of one layer: (name, the projections that share all its parameters but B), in model order.

        An adapter of one projection has the projection's name, one of several that of megatron's fused linear.
        """
        if not self.fuse_projections:
            return tuple((p, (p,)) for p in self.projections)
        chosen = [(linear, [p for p in fused if p in self.projections]) for linear, fused in MEGATRON_LINEARS.items()]
        return tuple((linear if len(group) > 1 else group[0], tuple(group)) for linear, group in chosen if group)

    @staticmethod
    def stored_name(name: str, projection: str, group: Sequence[str]) -> str:
        """How a parameter is called inside its adapter: several B need the projection's name to tell them apart."""
        return f"{name}_{projection}" if name == "B" and len(group) > 1 else name

    def parameter_shape(self, name: str, in_features: int, out_features: int) -> tuple[int, ...]:
        """Full (unsharded) shape of parameter ``name`` on a linear of the given widths."""
        n, m, num, rank, d = in_features, out_features, self.num_experts, self.expert_rank, self.shared_dim
        if name == "router":
            return (num, n)
        if name == "S":
            return (d, n)
        if name == "P":
            return (num, rank, d)
        if name == "A":
            return (num, rank, n) if self.is_mixture else (rank, n)
        if name == "B":
            return (num, m, rank) if self.is_mixture else (m, rank)
        raise KeyError(name)

    def adapter_fields(self) -> dict[str, Any]:
        """Only the adapter's own fields, also when called on a subclass (the training config)."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(AdapterSpec)}

    def validate_adapter(self) -> None:
        """Check all fields against each other.

        Raises:
            ConfigError: naming the key, its value, the rule and the cure.
        """
        if self.method not in METHODS:
            raise ConfigError("method", self.method, f"must be one of {', '.join(METHODS)}", "choose one of them")
        known = set(PROJECTIONS) | set(MEGATRON_LINEARS)
        if not self.target_modules:
            raise ConfigError(
                "target_modules", [], "needs at least one projection", f"choose from {', '.join(PROJECTIONS)}"
            )
        for target in self.target_modules:
            if target not in known:
                raise ConfigError(
                    "target_modules",
                    target,
                    "matches no projection of a Llama layer",
                    f"choose from {', '.join(PROJECTIONS)} or {', '.join(MEGATRON_LINEARS)}",
                )
        for key in ("lora_rank", "num_lora_experts", "topk", "shared_dim"):
            if getattr(self, key) < 1:
                raise ConfigError(key, getattr(self, key), "must be at least 1", "raise it")
        for key in ("lora_alpha", "rank_expansion"):
            if not getattr(self, key) > 0:
                raise ConfigError(key, getattr(self, key), "must be positive", "raise it")
        if self.expert_rank < 1:
            raise ConfigError(
                "rank_expansion",
                self.rank_expansion,
                f"round(rank_expansion * lora_rank={self.lora_rank}) must be at least 1",
                "raise it",
            )
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ConfigError("lora_dropout", self.lora_dropout, "must lie in [0, 1)", "0.05 is a usual value")
        if self.aux_loss_coeff < 0:
            raise ConfigError("aux_loss_coeff", self.aux_loss_coeff, "must not be negative", "set 0 to switch it off")
        if self.is_mixture and self.topk > self.num_lora_experts:
            raise ConfigError(
                "topk",
                self.topk,
                f"must not exceed num_lora_experts={self.num_lora_experts}",
                "lower topk or add experts",
            )

    def adapter_warnings(self) -> list[str]:
        """Settings that work but waste something, as sentences for the start-up banner."""
        if self.method == "malora" and self.shared_dim < self.expert_rank:
            return [
                f"shared_dim={self.shared_dim} is below the expert rank r'={self.expert_rank}: "
                f"B_t P_t has rank at most {self.shared_dim}, the rest of r' is wasted"
            ]
        return []
