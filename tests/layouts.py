"""The layouts on which training is compared with the one-process oracle; docs/layouts.md shows the same table."""

from __future__ import annotations

from dataclasses import dataclass, replace

from malora_dist.methods.base import METHODS as REGISTERED

#: Compared on every layout that suits them: all that are registered, but for the ablations.
METHODS = tuple(name for name, method in REGISTERED.items() if not method.is_ablation)
MIXTURES = tuple(name for name in METHODS if REGISTERED[name].is_mixture())
SINGLE = tuple(name for name in METHODS if name not in MIXTURES)


@dataclass(frozen=True)
class Layout:
    """One row: so many processes, of which TP * PP share a model and the rest are DP.

    Attributes:
        stages: layers of each pipeline rank, where they differ.
        layers: of the test's model.
        methods: compared on this row.
    """

    name: str
    processes: int
    tp: int = 1
    pp: int = 1
    chunks: int = 1
    ep: int = 1
    stages: tuple[int, ...] = ()
    layers: int = 2
    methods: tuple[str, ...] = METHODS

    def __str__(self) -> str:
        return self.name

    @property
    def dp(self) -> int:
        return self.processes // (self.tp * self.pp)

    @property
    def settings(self) -> list[str]:
        """The config keys of the layout."""
        settings = [
            f"tensor_model_parallel_size={self.tp}",
            f"sequence_parallel={str(self.tp > 1).lower()}",
            f"pipeline_model_parallel_size={self.pp}",
            f"virtual_pipeline_model_parallel_size={self.chunks}",
            f"expert_model_parallel_size={self.ep}",
        ]
        return settings + ([f"decoder_last_pipeline_num_layers={self.stages[-1]}"] if self.stages else [])

    def of(self, method: str) -> Layout:
        """The same layout for a method; one expert cannot be sharded, its ranks work data-parallel."""
        return self if REGISTERED[method].is_mixture() else replace(self, ep=1)


# fmt: off
LAYOUTS = (
    Layout("1 process",               1),
    Layout("DP 2",                    2,                                methods=SINGLE),
    Layout("EP 2",                    2,                    ep=2,       methods=MIXTURES),
    Layout("EP 4",                    4,                    ep=4,       methods=MIXTURES),
    Layout("DP 4, EP 2",              4,                    ep=2,       methods=MIXTURES),
    Layout("TP 2",                    2, tp=2),
    Layout("TP 2, EP 2",              4, tp=2,              ep=2,       methods=MIXTURES),
    Layout("TP 2, DP 2",              4, tp=2,                          methods=SINGLE),
    Layout("PP 2",                    2,       pp=2),
    Layout("PP 2 uneven",             2,       pp=2,              layers=3, stages=(2, 1)),
    Layout("PP 2 interleaved",        2,       pp=2, chunks=2,    layers=4),
    Layout("PP 2 interleaved, EP 2",  4,       pp=2, chunks=2, ep=2, layers=4, methods=MIXTURES),
    Layout("TP 2, PP 2",              4, tp=2, pp=2),
    Layout("TP 2, PP 2, DP 2",        8, tp=2, pp=2,                    methods=SINGLE),
    Layout("TP 2, PP 2, EP 2",        8, tp=2, pp=2,        ep=2,       methods=MIXTURES),
    Layout("PP 4 interleaved, EP 2",  8,       pp=4, chunks=2, ep=2, layers=8, methods=MIXTURES),
)
# fmt: on


def find(name: str) -> Layout:
    """The layout of that name."""
    (layout,) = (layout for layout in LAYOUTS if layout.name == name)
    return layout


def label(methods: tuple[str, ...]) -> str:
    """How docs/layouts.md calls the methods of a row."""
    return {METHODS: "all seven", SINGLE: "without a router", MIXTURES: "with a router"}[methods]


def dispatches(layout: Layout, method: str) -> tuple[str, ...]:
    """With which exchanges a row runs a method: both on EP 2, elsewhere MALoRA both and the others by turns."""
    if layout.ep == 1:
        return ("auto",)
    both = ("all_to_all", "gather_experts")
    if layout.name == "EP 2" or (method == "malora" and layout.processes < 8):
        return both
    return (both[(MIXTURES.index(method) + LAYOUTS.index(layout)) % 2],)
