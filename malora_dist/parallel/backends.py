"""Which implementation computes what, where there are several, and why; the banner shows it.

Each part is one config key. A value by name is taken or refused; `auto` takes the first that is
usable and says what was against the others. Importable is not usable: the fused ones are CUDA
kernels, and the package named `apex` on PyPI is another project than NVIDIA's.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from malora_dist.config import Config
from malora_dist.config_sections import TrainConfig
from malora_dist.errors import BackendUnavailableError

#: torch's own, usable everywhere.
TORCH_ADAM = "torch.optim.AdamW"
TORCH_ATTENTION = "torch.nn.functional.scaled_dot_product_attention"


@dataclass(frozen=True)
class Choice:
    """What one part of the system is computed by.

    Attributes:
        part: what is computed, for example `Adam`.
        chosen: what does it; of Adam and attention the dotted name of the class or function.
        reason: why this one.
    """

    part: str
    chosen: str
    reason: str

    def load(self) -> Any:
        """The class or function."""
        return _load(self.chosen)


@dataclass(frozen=True)
class _Fused:
    """An implementation from an optional package of CUDA kernels.

    Attributes:
        value: the config key's value that asks for it.
        name: dotted name of the class.
        kernel: dotted name of the compiled function below it, which half a build and namesakes lack.
    """

    value: str
    name: str
    kernel: str

    def defect(self) -> str | None:
        """Why this Python cannot use it, if it cannot."""
        for name in (self.name, self.kernel):
            try:
                _load(name)
            except (ImportError, AttributeError, OSError) as error:  # OSError: a shared library is missing
                return f"{name} is not there ({' '.join(str(error).split())})"
        return None


#: In megatron-core's own order of preference.
_ADAMS = (
    _Fused(
        "transformer_engine",
        "transformer_engine.pytorch.optimizers.FusedAdam",
        "transformer_engine_torch.multi_tensor_adam",
    ),
    _Fused("apex", "apex.optimizers.FusedAdam", "amp_C.multi_tensor_adam"),
)
_ATTENTIONS = (
    _Fused(
        "transformer_engine",
        "megatron.core.extensions.transformer_engine.TEDotProductAttention",
        "transformer_engine_torch.fused_attn_fwd",
    ),
)


def adam_choice(config: TrainConfig, device: torch.device) -> Choice:
    """The Adam that the config key ``adam_implementation`` means on ``device``.

    Raises:
        BackendUnavailableError: asked for by name and not usable.
    """
    return _choose("Adam", "adam_implementation", config.adam_implementation, _ADAMS, TORCH_ADAM, _against(device))


def attention_choice(config: Config, device: torch.device) -> Choice:
    """The core attention that the config key ``attention_implementation`` means on ``device``.

    Raises:
        BackendUnavailableError: asked for by name and not usable.
    """
    against = _against(device)
    if against is None and not config.bf16:
        against = "Transformer Engine holds all scores of all heads in float32, its fused kernels need bf16=true"
    if against is None and config.packing:
        against = "Transformer Engine's kernels are not told of the documents in a row, which packing=true needs"
    asked = config.attention_implementation
    return _choose("attention", "attention_implementation", asked, _ATTENTIONS, TORCH_ATTENTION, against)


def _against(device: torch.device) -> str | None:
    """What speaks against every fused implementation on ``device``."""
    return None if device.type == "cuda" else f"fused kernels need CUDA, this run is on {device.type}"


def _choose(part: str, key: str, asked: str, fused: Sequence[_Fused], default: str, against: str | None) -> Choice:
    """The first fused implementation that is admitted by ``asked`` and usable, else the default.

    Args:
        against: what keeps this run from all of them, whatever is installed.
    """
    admitted = [candidate for candidate in fused if asked in ("auto", candidate.value)]
    obstacles = [against] if against and admitted else []
    for candidate in admitted if against is None else ():
        defect = candidate.defect()
        if defect is None:
            return Choice(part, candidate.name, _reason(asked, obstacles or ["usable here"]))
        obstacles.append(defect)
    if obstacles and asked != "auto":
        raise BackendUnavailableError(f"{key}={asked!r}: {'; '.join(obstacles)}; use {key}=auto")
    return Choice(part, default, _reason(asked, obstacles))


def _reason(asked: str, found: Sequence[str]) -> str:
    return f"auto: {'; '.join(found)}" if asked == "auto" else "asked for"


def _load(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)
