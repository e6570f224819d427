"""Jobs of tests/test_families.py and tests/test_conversion_adapter.py: what megatron models load and save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from malora_dist.checkpoint.base import checkpoint_dir, hf_dir
from malora_dist.config import Config
from malora_dist.families.base import Family, family_of
from malora_dist.parallel import topology as layout
from malora_dist.parallel.device import without_expected_warnings
from tests import jobs

SEQUENCE = 96


def token_ids(vocab_size: int) -> Tensor:
    """Two rows, every token of a small vocabulary among them. int64 [2, SEQUENCE]"""
    return torch.arange(2 * SEQUENCE).reshape(2, SEQUENCE) % vocab_size


def logits_of_bases(parallel: dict[str, int], bases: dict[str, Path], resave: bool) -> dict[str, Tensor]:
    """Load each base into a float32 model and run it through megatron's schedule.

    Args:
        parallel: the sizes in a Config.
        bases: {name: converted base}.
        resave: write each model's base weights to `resaved` beside its base, in this layout's own chunks.

    Returns:
        {name: logits of :func:`token_ids`, [2, SEQUENCE, vocabulary of this TP rank]} on the last stage, else {}.
    """
    is_tensor_parallel = parallel.get("tensor_model_parallel_size", 1) > 1
    # The adapters start at zero and are not what is tested: the least that a model can have.
    config = Config(
        **parallel,
        sequence_parallel=is_tensor_parallel,
        seq_length=SEQUENCE,
        device="cpu",
        method="lora",
        target_modules=["down_proj"],
    )
    topology = layout.initialize(config)
    try:
        logits: dict[str, Tensor] = {}
        for name, base in bases.items():
            family = family_of(hf_dir(base))
            with without_expected_warnings():
                model = _load(family, base, config, topology, base.with_name("resaved") if resave else None)
            logits.update((name, output) for output in _forward(model, token_ids(family.hf.vocab_size)))
        return logits
    finally:
        layout.destroy()


def _load(family: Family, base: Path, config: Config, topology: layout.Topology, resaved: Path | None) -> list[Any]:
    """This rank's chunks of the model with the weights of `base`."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    from malora_dist.checkpoint.adapter import load_base_weights
    from malora_dist.exchange.plan import plan_exchanges
    from malora_dist.layers.adapted_linear import is_adapter_key
    from malora_dist.layers.adapter import AdapterSettings
    from malora_dist.layers.routing_context import RoutingContext
    from malora_dist.models.build import adapter_sites, build_stages

    sites = adapter_sites(family.hf, config, topology)
    plan = plan_exchanges(config, sites, topology.ep_group, topology.device)
    settings = AdapterSettings(config, topology, plan, RoutingContext(), seed=0)
    model = build_stages(family, config, settings)

    def base_shards() -> dict[str, Any]:
        """With megatron's empty `_extra_state` objects."""
        states = [chunk.sharded_state_dict(metadata={"dp_cp_group": topology.dp_group}) for chunk in model]
        return {f"{i} {k}": v for i, state in enumerate(states) for k, v in state.items() if not is_adapter_key(k)}

    for chunk in model:
        for key, parameter in chunk.named_parameters():
            if not is_adapter_key(key):
                parameter.data.fill_(float("nan"))  # what is not loaded shows
    dist_checkpointing.load(base_shards(), str(checkpoint_dir(base)))  # every key that megatron asks for is there
    load_base_weights(checkpoint_dir(base), model, topology)
    if resaved is not None:
        resaved.mkdir(exist_ok=True)
        torch.distributed.barrier()
        strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
        dist_checkpointing.save(base_shards(), str(resaved), strategy)
    return model


@torch.no_grad()
def _forward(model: list[Any], tokens: Tensor) -> list[Tensor]:
    """The logits [b, s, v] of one microbatch, as megatron's schedule reports them on the last stage; else nothing."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def report(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return logits.sum(), torch.tensor(logits.shape[1]), logits

    def forward_step(_data: Any, stage: Any) -> Any:
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        return stage(tokens, positions, None), report

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[None] * len(model),
        model=[chunk.eval() for chunk in model],
        num_microbatches=1,
        seq_length=tokens.shape[1],
        micro_batch_size=tokens.shape[0],
        forward_only=True,
    )


def train_from_shards(overrides: list[str]) -> tuple[dict[str, jobs.Shard], dict[str, jobs.Shard]]:
    """Train as the config says; this rank's adapter shards before and after."""
    trainer = jobs._trainer(overrides)

    def shards() -> dict[str, jobs.Shard]:
        return {k: (where, shape, p.detach().clone()) for k, (p, where, shape) in jobs._adapter_shards(trainer).items()}

    try:
        start = shards()
        trainer.train()
        return start, shards()
    finally:
        layout.destroy()
