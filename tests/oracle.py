"""One-process reference of a training run: transformers' model, malora_dist.methods on plain tensors, torch's AdamW.

Nothing of megatron, the exchanges or the trainer is in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from malora_dist.config import Config
from malora_dist.data.batches import Microbatch
from malora_dist.methods.initial import initial_parameter
from malora_dist.methods.reference import adapted_forward
from malora_dist.methods.routing import router_logits
from malora_dist.methods.spec import AdapterSpec
from malora_dist.methods.start import keyed_generator


def random_start(seed: int, key: str, shape: Sequence[int]) -> Tensor:
    """The start in parity tests of what starts at zero, so that every gradient is alive."""
    return 0.1 * torch.randn(tuple(shape), generator=keyed_generator(seed, "test B", key))


@dataclass
class Record:
    """What a run leaves behind: per step losses, norms and gradients, and the parameters at its end.

    Attributes:
        counts: {site: top-k slots by task and expert of the last step}, padding left out.
    """

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    grads: list[dict[str, Tensor]] = field(default_factory=list)
    input_grads: list[list[Tensor]] = field(default_factory=list)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, list[list[float]]] = field(default_factory=dict)
    smallest_margin: float = float("inf")


class OracleRun:
    """A model with adapters on ``spec.projections``; parameter keys are ``layers.<i>.<adapter>.<parameter>``.

    Args:
        dropout_masks: what dropout multiplied the input of an adapter with, [b, s, n] by (step,
            microbatch of the global batch, ``layers.<i>.<adapter>``); without one nothing is dropped.
    """

    def __init__(
        self, llama_dir: Path, spec: AdapterSpec, seed: int, dropout_masks: Mapping[Any, Tensor] | None = None
    ) -> None:
        self.dropout_masks = dropout_masks or {}
        self.place = (0, 0)
        self.spec = spec
        self.model = AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.float32)
        self.model.requires_grad_(False)
        self.params: dict[str, Tensor] = {}
        self.aux: list[Tensor] = []
        self.valid_BS: Tensor | None = None
        self.tasks_BS: Tensor | None = None
        self.num_tasks = 0
        self.counts: dict[str, Tensor] = {}
        self.margin = float("inf")
        for i, layer in enumerate(self.model.model.layers):
            for name, projections in spec.adapters:
                for projection in projections:
                    linear = getattr(layer.self_attn if projection[0] in "qkvo" else layer.mlp, projection)
                    own = {
                        declared: f"layers.{i}.{name}.{key}"
                        for key, (declared, served) in spec.stored_parameters(projections).items()
                        if projection in served
                    }
                    self._make_parameters(i, name, own, linear, seed)
                    linear.register_forward_hook(
                        self._hook(f"layers.{i}.{name}", own, is_first=projection == projections[0])
                    )

    def _make_parameters(
        self, layer: int, adapter: str, names: Mapping[str, str], linear: torch.nn.Linear, seed: int
    ) -> None:
        method = self.spec.declared
        starts = {}
        for declared, key in names.items():
            value = initial_parameter(method, declared, linear.in_features, linear.out_features, seed, layer, adapter)
            if method.parameters[declared].from_norms:
                value = method.squared_norms(starts, linear.weight).sqrt()
            starts[declared] = value  # zero still where it starts at zero, as the norms want it
            self.params.setdefault(key, value.clone())
        for declared, key in names.items():
            if not starts[declared].any():
                self.params[key] = random_start(seed, key, starts[declared].shape)
            self.params[key].requires_grad_(method.is_trained(declared))

    def _hook(self, site: str, names: Mapping[str, str], is_first: bool) -> Any:
        method = self.spec.declared

        def hook(linear: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            (x_BSI,) = args
            params = {declared: self.params[key] for declared, key in names.items()}
            x_TI = x_BSI.flatten(0, 1)
            assert self.valid_BS is not None
            mask_BSI = self.dropout_masks.get((*self.place, site))
            dropped_x_TI = None if mask_BSI is None else x_TI * mask_BSI.flatten(0, 1)
            # megatron flattens [s, b]; tokens are independent, so [b, s] gives the same sums.
            y, aux = adapted_forward(method, params, x_TI, linear.weight, self.valid_BS.flatten(), dropped_x_TI)
            if is_first:  # one router, one loss
                self.aux.append(aux)
            if method.is_mixture():
                probs = router_logits(x_BSI.detach(), params["router"]).softmax(-1)
                top = probs[self.valid_BS].topk(min(self.spec.topk + 1, self.spec.num_experts)).values
                if is_first:
                    self._count(site, probs)
                if top.shape[-1] > self.spec.topk:
                    self.margin = min(self.margin, float((top[:, -2] - top[:, -1]).min().detach()))
            y = y.view_as(output)
            return y if linear.bias is None else y + linear.bias

        return hook

    def _count(self, site: str, probs_BSN: Tensor) -> None:
        """Which task's tokens the router sends where, one by one."""
        assert self.tasks_BS is not None
        chosen_BSK = probs_BSN.topk(self.spec.topk).indices
        counts = self.counts.setdefault(site, torch.zeros(self.num_tasks, self.spec.num_experts))
        for task, experts in zip(self.tasks_BS.flatten().tolist(), chosen_BSK.flatten(0, 1).tolist(), strict=True):
            for expert in experts if task else ():
                counts[task - 1, expert] += 1

    def train(self, steps: Sequence[Sequence[Microbatch]], config: Config) -> Record:
        """AdamW over ``steps``, each a list of the global batch's microbatches."""
        record = Record()
        trainable = {key: p for key, p in self.params.items() if p.requires_grad}
        decays = {"params": [p for p in trainable.values() if p.dim() > 1], "weight_decay": config.weight_decay}
        vectors = {"params": [p for p in trainable.values() if p.dim() == 1], "weight_decay": 0.0}  # megatron's rule
        optimizer = torch.optim.AdamW(
            [decays, vectors], config.lr, (config.adam_beta1, config.adam_beta2), config.adam_eps
        )
        self.num_tasks = len(config.data)
        for step, microbatches in enumerate(steps):
            self.counts.clear()
            optimizer.zero_grad()
            record.input_grads.append([])
            answer_tokens = sum(float(m.loss_mask_BS.sum()) for m in microbatches)
            lm_loss = 0.0
            for index, microbatch in enumerate(microbatches):
                self.place = (step, index)
                self.aux.clear()
                self.tasks_BS, self.valid_BS = microbatch.token_task_BS, microbatch.token_task_BS > 0
                embedded = self.model.model.embed_tokens(microbatch.tokens_BS).requires_grad_()
                logits = self.model(inputs_embeds=embedded, position_ids=microbatch.position_ids_BS).logits
                losses = F.cross_entropy(logits.flatten(0, 1), microbatch.labels_BS.flatten(), reduction="none")
                loss = (losses * microbatch.loss_mask_BS.flatten()).sum() / answer_tokens
                lm_loss += float(loss.detach())
                (loss + torch.stack(self.aux).sum() / len(microbatches)).backward()
                assert embedded.grad is not None
                record.input_grads[-1].append(embedded.grad)
            record.losses.append(lm_loss)
            grads = {key: torch.zeros_like(p) if p.grad is None else p.grad.clone() for key, p in trainable.items()}
            record.grads.append(grads)
            record.grad_norms.append(float(torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()))
            if config.clip_grad > 0:
                torch.nn.utils.clip_grad_norm_(trainable.values(), config.clip_grad)
            optimizer.step()
        record.parameters = {key: p.detach().clone() for key, p in self.params.items()}
        record.counts = {site: counts.tolist() for site, counts in self.counts.items()}
        record.smallest_margin = self.margin
        return record
