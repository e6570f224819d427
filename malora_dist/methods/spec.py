"""What one adapter is in the configuration: the method, its widths, its routing and its targets."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from malora_dist.errors import ConfigError
from malora_dist.fields import check_fields, key
from malora_dist.methods.base import METHODS, Method

#: The seven linear projections of a layer, by their Hugging Face names, and where
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
    """Which adapter is put on which projections; the methods are the files of malora_dist/methods/."""

    method: str = key("malora", "what is added to a frozen linear, and how it starts; docs/methods.md has them all")
    target_modules: list[str] = key(
        list(PROJECTIONS),
        "projections to adapt, by Hugging Face name (q_proj, ...) or megatron name (linear_qkv, ...)",
        choices=(*PROJECTIONS, *MEGATRON_LINEARS),
        required=True,
    )
    lora_rank: int | None = key(None, "r, rank of one expert, PEFT's `r`; by default the method's", minimum=1)
    lora_alpha: float | None = key(None, "numerator of the scaling s = lora_alpha / lora_rank", above=0)
    use_rslora: bool = key(False, "s = lora_alpha / sqrt(lora_rank) instead (rsLoRA)")
    lora_dropout: float = key(
        0.0,
        "dropout on the input of S_A (or A); the router sees x undropped",
        minimum=0,
        below=1,
        cure="0.05 is a usual value",
    )
    num_lora_experts: int = key(8, "N, experts per adapted projection (methods with a router)", minimum=1)
    topk: int = key(2, "k, experts per token (methods with a router)", minimum=1)
    shared_dim: int = key(32, "d, width of the shared subspace S_A x (malora)", minimum=1)
    beta: float = key(1.0, "scale of MALoRA's start: S_A starts beta times as large and P_t divided by beta", above=0)
    freeze: list[str] = key([], "parameters that stay at their start, by the method's names, for example [S] or [P]")
    fuse_projections: bool = key(
        False, "q, k, v share one router and down-projection, gate and up another; each keeps its own B"
    )
    norm_topk_prob: bool = key(True, "renormalise the kept gates to sum 1 when topk > 1 (methods with a router)")
    aux_loss_coeff: float = key(
        0.01,
        "load-balancing loss coefficient, per adapted projection (methods with a router)",
        minimum=0,
        cure="set 0 to switch it off",
    )

    def __post_init__(self) -> None:
        """Put the method's defaults in the place of what is not given."""
        if self.method in METHODS:
            declared = self.declared
            self.lora_rank, self.lora_alpha = declared.rank, declared.alpha

    @property
    def declared(self) -> Method:
        """The method's declaration, with these settings.

        Raises:
            ConfigError: there is no such method.
        """
        return METHODS[self.method](self)

    @property
    def is_mixture(self) -> bool:
        """Whether tokens are routed among experts."""
        return METHODS[self.method].is_mixture()

    @property
    def num_experts(self) -> int:
        """N; 1 for the methods without a router."""
        return self.declared.num_experts

    @property
    def projections(self) -> tuple[str, ...]:
        """`target_modules` as Hugging Face projection names, in model order."""
        chosen: set[str] = set()
        for target in self.target_modules:
            chosen.update(MEGATRON_LINEARS.get(target, (target,)))
        return tuple(p for p in PROJECTIONS if p in chosen)

    @property
    def adapters(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """The adapters of one layer: (name, the projections it serves), in model order.

        An adapter of one projection has the projection's name, one of several that of megatron's fused linear;
        its projections share every parameter that has no ``out`` axis.
        """
        if not self.fuse_projections:
            return tuple((p, (p,)) for p in self.projections)
        chosen = [(linear, [p for p in fused if p in self.projections]) for linear, fused in MEGATRON_LINEARS.items()]
        return tuple((linear if len(own) > 1 else own[0], tuple(own)) for linear, own in chosen if own)

    def stored_parameters(self, projections: Sequence[str]) -> dict[str, tuple[str, tuple[str, ...]]]:
        """The parameters of an adapter of these projections: {name there: (declared name, projections it serves)}.

        Only the parameters of one projection need its name to tell them apart.
        """
        stored: dict[str, tuple[str, tuple[str, ...]]] = {}
        for name, param in self.declared.parameters.items():
            if "out" in param.axes and len(projections) > 1:
                stored |= {f"{name}_{p}": (name, (p,)) for p in projections}
            else:
                stored[name] = (name, tuple(projections))
        return stored

    def adapter_fields(self) -> dict[str, Any]:
        """Only the adapter's own fields, also when called on a subclass (the training config)."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(AdapterSpec)}

    def identity(self) -> dict[str, Any]:
        """The fields that together are the adapter's function: those in which a resumed run equals its checkpoint."""
        names = ["method", "lora_rank", "lora_alpha", "use_rslora", "fuse_projections"]
        if self.is_mixture:
            names += ["num_lora_experts", "topk", "norm_topk_prob"]
        if self.declared.uses("shared"):
            names.append("shared_dim")
        frozen = sorted(name for name in self.declared.parameters if not self.declared.is_trained(name))
        found = {"target_modules": self.projections, "freeze": frozen}
        return found | {name: getattr(self, name) for name in names}

    def validate_adapter(self) -> None:
        """Check the adapter's own fields, each and against each other.

        Raises:
            ConfigError: naming the key, its value, the rule and the cure.
        """
        declared = self.declared  # refuses an unknown method
        check_fields(self, of=AdapterSpec)
        if self.is_mixture and self.topk > self.num_lora_experts:
            raise ConfigError(
                "topk",
                self.topk,
                f"must not exceed num_lora_experts={self.num_lora_experts}",
                "lower topk or add experts",
            )
        declared.check()


def refuse_former_malora(method: object, rank_expansion: object) -> None:
    """Refuse MALoRA as files of an earlier form of this project hold it; their other methods are what they are now.

    Args:
        rank_expansion: a field of those files only; None: there is none.

    Raises:
        ConfigError: naming it and the cure.
    """
    if method == "malora" and rank_expansion is not None:
        raise ConfigError(
            "rank_expansion",
            rank_expansion,
            "is of MALoRA in a former form of this project, which was not the paper's",
            "train it again, with the rank of one expert as lora_rank",
        )
