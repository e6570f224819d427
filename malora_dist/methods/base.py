"""What a method is: parameters with named axes, and the maths of one adapter on one process.

A method declares its parameters by axes from a short list, and says in three short functions how they
act. Everything else follows from the axes: full shapes, which part a rank holds, what megatron is told
about a gradient, offsets in a checkpoint, counts, bytes that travel, names in a PEFT adapter.

========  =====  ======================================================================
axis      width  meaning
========  =====  ======================================================================
in        n      input of the adapted projection
out       m      its output; a parameter with this axis belongs to one projection
rank      r      rank of one expert
shared    d      the subspace that all experts share
expert    N      one slice per expert; sharded over expert-parallel ranks
logit     N      one row per expert that every rank needs: the router
========  =====  ======================================================================

Shape suffixes, the same in the whole project: T tokens (or rows made of them), I input width n, O output
width m, N experts, E experts at hand on this rank, K experts per token, R rank of one expert, D width of
what is sent to the experts (d for MALoRA); around the model B rows of a batch, S positions, L positions with a loss,
J tasks, H hidden. Everything else is spelled out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from malora_dist.errors import ConfigError
from malora_dist.methods.start import Draw, Settings, kaiming_uniform
from malora_dist.registry import Registry

#: How a megatron linear is sharded over tensor-parallel ranks: its output (column) or its input (row).
Style = Literal["column", "row"]
AXES = ("in", "out", "rank", "shared", "expert", "logit")


#: Makes the start of a parameter, or of one expert's slice of it; float32 on the CPU.
Start = Callable[[Draw], Tensor]


class Placement(NamedTuple):
    """How a parameter lies on the ranks, and what megatron is told of its gradient.

    Attributes:
        tp_axis: index of the axis sharded over tensor-parallel ranks; None: replicated there. A replica sees
            other tokens, or another part of the output, on every rank: its gradients are summed over TP.
        expert_axis: index of the axis sharded over expert-parallel ranks; None: replicated there.
    """

    tp_axis: int | None
    expert_axis: int | None

    @property
    def marks(self) -> dict[str, bool]:
        """megatron's attributes of a parameter."""
        return {
            "sequence_parallel": self.tp_axis is None,
            "allreduce": self.expert_axis is None,
            "tensor_model_parallel": self.tp_axis is not None,
        }


class Param:
    """One parameter of a method.

    Args:
        axes: names from :data:`AXES`, in the order of the tensor's axes; "expert" comes first.
        start: its start values; called once per expert where there is an expert axis.
        same_for_all: all experts start alike.
        from_norms: starts at the root of :meth:`Method.squared_norms` instead, once the base weight is loaded.
        trained: False: it stays at its start.
    """

    def __init__(
        self,
        *axes: str,
        start: Start = kaiming_uniform,
        same_for_all: bool = False,
        from_norms: bool = False,
        trained: bool = True,
    ) -> None:
        assert set(axes) <= set(AXES), f"{axes}: axes are {AXES}"
        assert "expert" not in axes[1:], "the expert axis comes first"
        self.axes, self.start, self.trained = axes, start, trained
        self.same_for_all, self.from_norms = same_for_all, from_norms

    @property
    def is_expert(self) -> bool:
        """Whether every expert has a slice of its own."""
        return "expert" in self.axes

    def placement(self, style: Style) -> Placement:
        """Tensor parallelism shards ``out`` of a column-parallel linear and ``in`` of a row-parallel one."""
        sharded = "out" if style == "column" else "in"
        return Placement(
            tp_axis=self.axes.index(sharded) if sharded in self.axes else None,
            expert_axis=0 if self.is_expert else None,
        )


class Chain(NamedTuple):
    """Names of the parameters of a method that is ``up (down (project x))``, which the fast kernels compute.

    Attributes:
        project: multiplies x before dispatch; None: x itself is sent.
        down: of each expert, multiplies what is sent; None: nothing does.
        up: of each expert, makes the output.
    """

    project: str | None
    down: str | None
    up: str


@dataclass(frozen=True)
class PeftForm:
    """A method that stock PEFT knows: its ``LoraConfig`` with these fields.

    Attributes:
        names: {parameter: what PEFT calls it after the module's name}.
    """

    names: Mapping[str, str]
    use_dora: bool = False


class Method:
    """One adapter method with its settings. Subclasses declare :class:`Param` attributes and the maths.

    The maths of one adapter, p being its parameters (those of one expert in :meth:`expert`)::

        z = project(p, x)                                   before tokens go to their experts
        v = sum over the top-k experts of g_t expert(p_t, z)   (one expert, g = 1, without a router)
        y = output(p, W0 x + s combine(p, v), norms)

    Attributes:
        chain: see :class:`Chain`; None: the method is computed by its own functions, expert by expert.
        sent: the axis of z.
        returned: the axis of what an expert returns.
        default_rank: `lora_rank` where the config names none.
        peft: see :class:`PeftForm`; None: this project's own PEFT tuner loads it.
        is_ablation: kept to reproduce a table of the paper.
    """

    chain: ClassVar[Chain | None] = None
    sent: ClassVar[str] = "shared"
    returned: ClassVar[str] = "out"
    default_rank: ClassVar[int] = 8
    peft: ClassVar[PeftForm | None] = None
    is_ablation: ClassVar[bool] = False
    parameters: ClassVar[dict[str, Param]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = {name: value for name, value in vars(cls).items() if isinstance(value, Param)}
        cls.parameters = {**cls.parameters, **own}
        if "chain" not in vars(cls) and {"project", "expert", "combine"} & vars(cls).keys():
            cls.chain = None  # an inherited one would no longer be the method

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.rank = self.default_rank if settings.lora_rank is None else settings.lora_rank
        self.alpha = 2.0 * self.rank if settings.lora_alpha is None else settings.lora_alpha

    # ---- the maths, overridden

    def project(self, p: Mapping[str, Tensor], x_TI: Tensor) -> Tensor:
        """What is sent to the experts. [T, D]

        Linear in x, and of the parameters with an ``in`` axis that no expert has for itself only: beside a row-parallel
        linear each rank has a share of the input, and the results are summed.
        """
        raise NotImplementedError

    def expert(self, p: Mapping[str, Tensor], z_TD: Tensor) -> Tensor:
        """What one expert makes of it. [T, O], or as wide as ``returned`` says"""
        raise NotImplementedError

    def combine(self, p: Mapping[str, Tensor], v: Tensor) -> Tensor:
        """From the gate-weighted sum over the experts to the projection's output, by shared parameters. [T, O]"""
        return v

    def squared_norms(self, p: Mapping[str, Tensor], weight_OI: Tensor) -> Tensor | None:
        """Of the rows of a weight that :meth:`output` needs, or their share in a shard of the input. [O] or None

        Computed once a step, and a constant for the gradient.
        """
        return None

    def output(self, p: Mapping[str, Tensor], y_TO: Tensor, squared_norms_O: Tensor | None) -> Tensor:
        """From the sum of base and adapter to the layer's output. [T, O]"""
        return y_TO

    @classmethod
    def has_output(cls) -> bool:
        """Whether the method changes the sum of base and adapter."""
        return cls.output is not Method.output

    @classmethod
    def needs_norms(cls) -> bool:
        """Whether :meth:`output` is given norms."""
        return cls.squared_norms is not Method.squared_norms

    # ---- what follows from the declaration

    def before_dispatch(self, params: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """The parameters that :meth:`project` may use, in a dtype: those with an input axis that are no expert's."""
        return {
            name: params[name].to(dtype)
            for name, param in self.parameters.items()
            if not param.is_expert and "in" in param.axes
        }

    @classmethod
    def is_mixture(cls) -> bool:
        """Whether tokens are routed among experts."""
        return any("logit" in param.axes for param in cls.parameters.values())

    @classmethod
    def uses(cls, axis: str) -> bool:
        """Whether any parameter has the axis."""
        return any(axis in param.axes for param in cls.parameters.values())

    @property
    def num_experts(self) -> int:
        """N; 1 for the methods without a router."""
        return self.settings.num_lora_experts if self.is_mixture() else 1

    @property
    def scaling(self) -> float:
        """s: alpha / r, or alpha / sqrt(r) with rsLoRA."""
        return self.alpha / (math.sqrt(self.rank) if self.settings.use_rslora else self.rank)

    def is_trained(self, name: str) -> bool:
        """Whether a parameter is trained; the others stay at their start."""
        return self.parameters[name].trained and name not in self.settings.freeze

    def widths(self, in_features: int, out_features: int) -> dict[str, int]:
        """{axis: width} on a projection of these widths."""
        return {
            "in": in_features,
            "out": out_features,
            "rank": self.rank,
            "shared": self.settings.shared_dim,
            "expert": self.num_experts,
            "logit": self.num_experts,
        }

    def shape(self, name: str, in_features: int, out_features: int) -> tuple[int, ...]:
        """Full (unsharded) shape of a parameter on a projection of these widths."""
        widths = self.widths(in_features, out_features)
        return tuple(widths[axis] for axis in self.parameters[name].axes)

    def check(self) -> None:
        """Refuse settings that cannot work with this method.

        Raises:
            ConfigError: naming key, value, rule and cure.
        """
        known = ", ".join(self.parameters)
        for name in self.settings.freeze:
            if name not in self.parameters:
                raise ConfigError(
                    "freeze", name, f"is no parameter of method={self.settings.method}", f"it has {known}"
                )
        if not any(self.is_trained(name) for name in self.parameters):
            raise ConfigError("freeze", self.settings.freeze, "leaves nothing to train", "take one out")

    def check_widths(self, projection: str, in_features: int, out_features: int) -> None:
        """Refuse a projection that is too narrow for this method.

        Raises:
            ConfigError: naming key, value, rule and cure.
        """

    def warnings(self) -> list[str]:
        """Settings that work but waste something, as sentences for the start-up banner."""
        return []


METHODS: Registry[Method] = Registry("malora_dist.methods", key="method")
register = METHODS.register
