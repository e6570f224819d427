"""Which exchange serves which linear: the config key ``dispatch`` on a layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.distributed import ProcessGroup

from malora_dist.config import Config
from malora_dist.errors import ConfigError
from malora_dist.exchange.base import EXCHANGES, Exchange, Site

#: Copies of one adapter's experts that are too small to ask what they are beside.
_SMALL = 4 * 2**20


@dataclass
class ExchangePlan:
    """How the tokens of each linear meet their experts.

    Attributes:
        exchanges: {megatron name of an adapted linear: its exchange}.
        reason: why these, for the banner.
        bytes_held: of the copies of experts that this rank holds through a step, for each layer.
        steps: how many steps or evaluations have begun; what is computed once in a step asks for it.
    """

    exchanges: Mapping[str, Exchange]
    reason: str
    bytes_held: int = 0
    steps: int = field(default=0, init=False)

    def begin_step(self) -> None:
        """Called before the first microbatch of an optimizer step or of an evaluation."""
        self.steps += 1
        for exchange in self._distinct():
            exchange.begin_step()

    def end_step(self, with_gradients: bool) -> None:
        """Called after the last microbatch, and before megatron's own reductions of gradients."""
        for exchange in self._distinct():
            exchange.end_step(with_gradients)

    def _distinct(self) -> list[Exchange]:
        return list(dict.fromkeys(self.exchanges.values()))

    def describe(self) -> str:
        """``all_to_all``, or ``gather_experts (linear_qkv, linear_proj), all_to_all (linear_fc2)``."""
        linears: dict[str, list[str]] = {}
        for linear, exchange in self.exchanges.items():
            linears.setdefault(exchange.name, []).append(linear)
        if len(linears) == 1:
            return next(iter(linears))
        return ", ".join(f"{name} ({', '.join(of)})" for name, of in linears.items())


def check_exchange(config: Config) -> None:
    """Refuse a value of the config key ``dispatch`` that is unknown or cannot work with the rest.

    Raises:
        ConfigError: naming key, value, rule and cure.
    """
    if config.dispatch == "auto":
        return
    if config.dispatch not in EXCHANGES:
        rule = f"must be one of auto, {', '.join(EXCHANGES)}"
        raise ConfigError("dispatch", config.dispatch, rule, "choose one of them")
    EXCHANGES[config.dispatch].check(config)


def cheapest_exchange(site: Site) -> str:
    """The automatic exchange that sends the fewest bytes, of those whose copies are small.

    Small: no larger than the frozen linear beside the adapter, or than 4 MiB.
    """
    allowed = max(site.frozen_bytes, _SMALL)
    automatic = [cls for cls in EXCHANGES.values() if cls.is_automatic and cls.bytes_held(site) <= allowed]
    # Where two send as many bytes, the one that leaves tokens where they are.
    return min(automatic, key=lambda cls: (cls.bytes_sent(site), cls.moves_tokens)).name


def plan_exchanges(
    config: Config, linears: Mapping[str, Sequence[Site]], group: ProcessGroup, device: torch.device
) -> ExchangePlan:
    """The exchanges that the config key ``dispatch`` means.

    ``auto`` is ``local`` with one expert-parallel rank, and otherwise :func:`cheapest_exchange` of the largest
    adapter of each linear.

    Args:
        linears: {megatron name of an adapted linear: its adapters}.

    Raises:
        ConfigError: see :func:`check_exchange`.
        BackendUnavailableError: ``fastmoe`` where fmoe cannot run.
    """
    names = dict.fromkeys(linears, config.dispatch)
    reason = "asked for"
    check_exchange(config)
    if not config.is_mixture:
        names, reason = dict.fromkeys(linears, "local"), f"method={config.method} has one expert"
    elif config.dispatch == "auto" and group.size() == 1:
        names, reason = dict.fromkeys(linears, "local"), "auto: all experts are on every rank"
    elif config.dispatch == "auto":
        names = {
            linear: cheapest_exchange(max(sites, key=lambda site: site.out_features))
            for linear, sites in linears.items()
        }
        reason = _bytes_of_each([site for sites in linears.values() for site in sites])
    made = {name: EXCHANGES[name](config.num_experts, group, device) for name in dict.fromkeys(names.values())}
    held = sum(EXCHANGES[names[linear]].bytes_held(site) for linear, sites in linears.items() for site in sites)
    return ExchangePlan({linear: made[name] for linear, name in names.items()}, reason, held)


def _bytes_of_each(sites: Sequence[Site]) -> str:
    """What each automatic exchange would send."""
    found = [
        f"{name} {sum(cls.bytes_sent(site) for site in sites) / 1e6:,.1f} MB"
        for name, cls in EXCHANGES.items()
        if cls.is_automatic
    ]
    return f"auto, by bytes sent per layer, step and rank with every row full: {', '.join(found)}"
