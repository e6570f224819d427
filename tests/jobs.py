"""Jobs of the distributed workers (tests/workers.py): each runs on every rank of its world."""

from __future__ import annotations

import contextlib
import importlib
import logging
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from malora_dist.config import Config
from malora_dist.config_file import load_config
from malora_dist.parallel import topology as layout
from malora_dist.parallel.device import without_expected_warnings
from tests.fmoe_double import FmoeFunctionsDouble
from tests.oracle import random_start

Shard = tuple[tuple[slice, ...], tuple[int, ...], Tensor]


def _trainer(overrides: list[str]) -> Any:
    logging.getLogger("megatron").setLevel(logging.ERROR)
    config = load_config(None, overrides)
    config.validate(layout.world_size_from_env())
    topology = layout.initialize(config, config.seed)
    with without_expected_warnings():
        from malora_dist.training.trainer import Trainer
    return Trainer(config, topology)


def _adapter_shards(trainer: Any) -> dict[str, tuple[Any, tuple[slice, ...], tuple[int, ...]]]:
    """Per adapter parameter: the parameter, where its shard lies in the full tensor, the full shape.

    Keys are ``layers.<number in the model>.<adapter>.<parameter>``.
    """
    from malora_dist.layers.adapted_linear import is_adapter_key

    found = {}
    for chunk in trainer.trained.model:
        for key, sharded in chunk.sharded_state_dict(metadata={"dp_cp_group": trainer.topology.dp_group}).items():
            if is_adapter_key(key):
                layer, *offset = sharded.global_offset
                where = tuple(slice(o, o + n) for o, n in zip(offset, sharded.data.shape, strict=True))
                name = ".".join(["layers", str(layer), *key.split(".")[-2:]])
                found[name] = (sharded.data, where, sharded.global_shape[1:])
    return found


def _randomise_zeros(trainer: Any) -> None:
    """Parity tests start what starts at zero at :func:`tests.oracle.random_start`, on every layout."""
    for key, (parameter, where, shape) in _adapter_shards(trainer).items():
        if not parameter.any():
            parameter.data.copy_(random_start(trainer.config.seed, key, shape)[where])


def _keep_dropout_masks(trainer: Any, masks: list[tuple[str, str, Tensor]]) -> None:
    """From now on note (site, style, multipliers [s * b, n]) of every call of an adapter's dropout."""
    from malora_dist.layers.adapter import Adapter

    for chunk in trainer.trained.model:
        for module in chunk.modules():
            if isinstance(module, Adapter):

                def drop(x: Tensor, module: Any = module, dropout: Any = module.dropout) -> Tensor:
                    dropped = dropout(x)
                    masks.append((module.site, module.style, (dropped / x).detach().nan_to_num(1.0)))
                    return dropped

                module.dropout = drop


def train_and_record(
    overrides: list[str],
    steps: int,
    randomise: bool = True,
    keep_inputs: bool = True,
    keep_masks: bool = False,
    sabotage: str = "",
    mixed_dispatch: bool = False,
    fmoe_double: bool = False,
) -> dict[str, Any]:
    """Train ``steps`` steps; this rank's losses, norms, input gradients, and shards of gradients and parameters.

    Args:
        keep_inputs: record the gradient of the embeddings; it makes their output a leaf that wants a gradient.
        keep_masks: record what dropout did.
        sabotage: a function of tests/sabotage.py that breaks the code while the job runs.
        mixed_dispatch: ``auto`` takes gather_experts and all_to_all by turns, whatever the bytes.
        fmoe_double: tests/fmoe_double.py stands for ``fmoe.functions``.
    """
    with contextlib.ExitStack() as changes:
        if sabotage:
            changes.enter_context(importlib.import_module("tests.sabotage").apply(sabotage))
        if mixed_dispatch:
            by_turns = ["gather_experts", "all_to_all"] * 2
            changes.enter_context(mock.patch("malora_dist.exchange.plan.cheapest_exchange", side_effect=by_turns))
        if fmoe_double:
            double = FmoeFunctionsDouble()
            changes.enter_context(mock.patch("malora_dist.exchange.fastmoe.load_fmoe_functions", return_value=double))
        return _train_and_record(overrides, steps, randomise, keep_inputs, keep_masks)


def _train_and_record(
    overrides: list[str], steps: int, randomise: bool, keep_inputs: bool, keep_masks: bool
) -> dict[str, Any]:
    trainer = _trainer(overrides)
    try:
        if randomise:
            _randomise_zeros(trainer)
        result: dict[str, Any] = {"losses": [], "grad_norms": [], "grads": [], "input_grads": [], "masks": []}
        if keep_masks:
            _keep_dropout_masks(trainer, result["masks"])
        inputs: list[Tensor] = []
        scales: list[float] = []

        def keep_input(_module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            kwargs["hidden_states"] = kwargs["hidden_states"].detach().requires_grad_()
            inputs.append(kwargs["hidden_states"])
            return args, kwargs

        if keep_inputs and trainer.topology.is_first_stage:
            trainer.trained.model[0].decoder.register_forward_pre_hook(keep_input, with_kwargs=True)
        step_optimizer = trainer.trained.optimizer.step

        def step_and_keep_gradients() -> Any:
            shards = _adapter_shards(trainer).items()
            result["grads"].append(
                {k: (where, shape, p.main_grad.clone()) for k, (p, where, shape) in shards if p.requires_grad}
            )
            return step_optimizer()

        trainer.trained.optimizer.step = step_and_keep_gradients
        count = trainer.batches.global_token_counts

        def count_and_keep(microbatches: Any) -> Any:
            counts = count(microbatches)
            scales.append(counts.answer_tokens)
            return counts

        trainer.batches.global_token_counts = count_and_keep
        for i in range(steps):
            inputs.clear()
            step = trainer.train_step(record=i == steps - 1)
            result["losses"].append(step.losses.overall)
            result["grad_norms"].append(step.grad_norm)
            grads = [x.grad / scales[-1] for x in inputs if x.grad is not None]  # [s / tp, b, h]
            result["input_grads"].append(grads)
        counts = trainer.recorded().routing.counts_JN
        result["counts"] = {site: counts_JN.tolist() for site, counts_JN in counts.items()}
        result["parameters"] = {
            k: (where, shape, p.detach().clone()) for k, (p, where, shape) in _adapter_shards(trainer).items()
        }
        t = trainer.topology
        result["place"] = {"dp": t.dp_rank, "tp": t.tp_rank, "pp": t.pp_rank, "ep": t.ep_rank}
        return result
    finally:
        layout.destroy()


def train_with_cli(overrides: list[str], forget_optimizer: bool = False) -> list[tuple[int, float]]:
    """The whole run as train.py does it; the logged (iteration, loss) pairs of this rank's steps.

    Args:
        forget_optimizer: empty Adam's state before the first step.
    """
    trainer = _trainer(overrides)
    try:
        if forget_optimizer:
            for part in getattr(trainer.trained.optimizer, "chained_optimizers", [trainer.trained.optimizer]):
                part.optimizer.state.clear()
        seen: list[tuple[int, float]] = []
        train_step = trainer.train_step

        def train_step_and_keep_loss(record: bool = False) -> Any:
            step = train_step(record)
            seen.append((step.iteration, step.losses.overall))
            return step

        trainer.train_step = train_step_and_keep_loss
        trainer.train()
        return seen
    finally:
        layout.destroy()


def dispatch_and_combine(
    dispatch: str, num_experts: int, z: list[Tensor], experts: list[Tensor], gates: list[Tensor], weights: Tensor
) -> dict[str, Tensor]:
    """One exchange on handmade routing: expert e multiplies its rows by ``weights[e]`` [D, O].

    Returns the combined output of this rank's tokens and the gradients of z, gates and this
    rank's weights for the loss sum(y^2) over all ranks.
    """
    from malora_dist.exchange.base import EXCHANGES
    from malora_dist.exchange.fastmoe import FastMoE
    from malora_dist.methods.routing import Routing

    config = Config(expert_model_parallel_size=layout.world_size_from_env(), device="cpu")
    topology = layout.initialize(config)
    try:
        if dispatch == "fastmoe":
            double = FmoeFunctionsDouble()
            exchange: Any = FastMoE(num_experts, topology.ep_group, topology.device, functions=double)
        else:
            exchange = EXCHANGES[dispatch](num_experts, topology.ep_group, topology.device)
        local = num_experts // topology.ep_size
        mine = weights[topology.ep_rank * local : (topology.ep_rank + 1) * local].clone().requires_grad_()
        own_z = z[topology.rank].clone().requires_grad_()
        own_gates = gates[topology.rank].clone().requires_grad_()
        indices = experts[topology.rank]
        probs = torch.zeros(own_z.shape[0], num_experts)
        [arrived] = exchange.dispatch([own_z], [Routing(own_gates, indices, probs)])
        rows, gates_TK, experts_TK = arrived.tokens
        y_rows = torch.einsum("wz,wjzm,wj->wm", rows, mine[experts_TK], gates_TK)
        back, token_of_row = exchange.send_back(y_rows, arrived)()
        y = own_z.new_zeros(own_z.shape[0], back.shape[1]).index_add(0, token_of_row, back)
        y.square().sum().backward()
        return {"y": y.detach(), "z": own_z.grad, "gates": own_gates.grad, "weights": mine.grad,
                "rows": torch.tensor(rows.shape[0])}  # fmt: skip
    finally:
        layout.destroy()


def order_of_work() -> tuple[list[str], list[str]]:
    """What one adapted linear does forward and backward: rows "start" and "arrive" around the frozen "gemm"."""
    from malora_dist.kernels.columns import Columns
    from malora_dist.kernels.experts import add_rows
    from malora_dist.parallel import collectives

    topology = layout.initialize(Config(device="cpu"))
    events: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = {"mm": "gemm", "alltoall_base_": "start"}.get(func.overloadpacket.__name__)
            if name is not None:
                events.append(name)
            return func(*args, **(kwargs or {}))

    wait = collectives._Transfer.wait

    def noted(self: Any) -> Tensor:
        events.append("arrive")
        return wait(self)

    try:
        x, rows, weight = (
            torch.randn(4, 8, requires_grad=True),
            torch.randn(4, 6, requires_grad=True),
            torch.randn(6, 8),
        )
        with Watch(), mock.patch.object(collectives._Transfer, "wait", noted):
            arrived = collectives.start_all_to_all_rows(rows, [4], [4], topology.ep_group)
            y = add_rows(torch.mm(x, weight.t()), arrived(), torch.arange(4), Columns(1, 0, 6))
            forward = list(events)
            y.sum().backward()
        return forward, events[len(forward) :]
    finally:
        layout.destroy()


def train_end_to_end(overrides: list[str], token_ids: Tensor) -> dict[str, Any]:
    """Evaluate, train, evaluate, save; then the trained model's logits for ``token_ids`` [b, s]."""
    trainer = _trainer(overrides)
    from malora_dist.layers.token_info import TokenInfo

    try:
        before = trainer.evaluate().losses.by_task
        trainer.train()
        after = trainer.evaluate().losses.by_task
        b, s = token_ids.shape
        for chunk in trainer.ddp:
            chunk.eval()
        trainer.plan.begin_step()
        with torch.no_grad():
            tokens = TokenInfo(tasks_BS=torch.ones_like(token_ids))
            logits = trainer.trained.model[0](token_ids, torch.arange(s).expand(b, s), None, packed_seq_params=tokens)
        return {"before": before, "after": after, "logits": logits}
    finally:
        layout.destroy()


def count_traffic(overrides: list[str]) -> dict[str, Any]:
    """One recorded step: the bytes this rank moved by group, its microbatches' shapes, the widths of its gradients."""
    trainer = _trainer(overrides)
    try:
        shapes = [tuple(m.tokens_BS.shape) for m in trainer.batches.train(0)]
        trainer.train_step(record=True)
        trainable = [p for chunk in trainer.trained.model for p in chunk.parameters() if p.requires_grad]
        return {
            "bytes": dict(trainer.traffic.bytes),
            "shapes": shapes,
            "replicated": sum(p.numel() for p in trainable if p.allreduce),
            "experts": sum(p.numel() for p in trainable if not p.allreduce),
            "summed over tp": sum(p.numel() for p in trainable if p.sequence_parallel),
        }
    finally:
        layout.destroy()
