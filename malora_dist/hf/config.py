"""The PEFT config of the tuner: the fields of AdapterSpec, plus what PEFT and provenance need."""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field
from enum import Enum

from peft.config import PeftConfig

from malora_dist.errors import ConfigError
from malora_dist.methods.spec import PROJECTIONS, AdapterSpec, refuse_former_malora


class MaloraPeftType(str, Enum):  # noqa: UP042 - as PEFT's own PeftType; StrEnum prints without the class name
    """The tuner's entry in PEFT's tables; equal to, and hashed as, the string in adapter_config.json."""

    MALORA = "MALORA"


@dataclass
class MaloraConfig(PeftConfig, AdapterSpec):
    """Config of a token-routed adapter, with the field names of :class:`AdapterSpec`.

    `target_modules` takes Hugging Face names, megatron names, or PEFT's ``"all-linear"``; it is
    kept (and saved) as a sorted list of Hugging Face names.

    Raises:
        ConfigError: a field holds a value that cannot work.
    """

    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "further modules to train and save whole, as in PEFT"}
    )
    base_fingerprint: str = field(default="", metadata={"help": "fingerprint of the base the adapter was trained on"})
    seed: int = field(default=1234, metadata={"help": "seeds the start values"})
    rank_expansion: InitVar[float | None] = None  # in files of a former form

    def __post_init__(self, rank_expansion: float | None) -> None:
        super().__post_init__()
        refuse_former_malora(self.method, rank_expansion)
        AdapterSpec.__post_init__(self)
        self.peft_type = MaloraPeftType.MALORA
        if self.declared.peft is not None:
            raise ConfigError(
                "method",
                self.method,
                "is a LoRA that PEFT knows itself, a MaloraConfig is for methods with a router",
                f"use peft.LoraConfig(use_dora={self.declared.peft.use_dora})",
            )
        if not self.is_mixture or self.declared.has_output():
            rule = "has no router, or changes the layer's whole output, which this tuner does not do"
            raise ConfigError("method", self.method, rule, "train it with malora_dist.train")
        if self.fuse_projections:
            raise ConfigError(
                "fuse_projections",
                True,
                "must be false in a MaloraConfig, PEFT adapts each projection by itself",
                "train it with malora_dist.train; an export writes what is shared once per projection",
            )
        if self.target_modules in (None, "all-linear"):
            self.target_modules = list(PROJECTIONS)
        if isinstance(self.target_modules, str):
            raise ConfigError(
                "target_modules", self.target_modules, "must be a list of projections", f'use ["{PROJECTIONS[0]}", ...]'
            )
        self.target_modules = list(self.target_modules)
        self.validate_adapter()
        self.target_modules = sorted(self.projections)
