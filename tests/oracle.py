"""One-process reference of a training run: transformers' Llama, malora_dist.methods on plain tensors, torch's AdamW.

Nothing of megatron, the dispatchers or the trainer is in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from malora_dist.config import TrainConfig
from malora_dist.data.batches import Microbatch
from malora_dist.methods import maths
from malora_dist.methods.spec import AdapterSpec
from malora_dist.methods.start import initial_parameter, keyed_generator


def start_of_up_projection(seed: int, key: str, shape: Sequence[int]) -> Tensor:
    """The start of B in parity tests: random instead of zero, so that every gradient is alive."""
    return 0.1 * torch.randn(tuple(shape), generator=keyed_generator(seed, "test B", key))


@dataclass
class Record:
    """What a run leaves behind: per step losses, norms and gradients, and the parameters at its end."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    grads: list[dict[str, Tensor]] = field(default_factory=list)
    input_grads: list[list[Tensor]] = field(default_factory=list)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    smallest_margin: float = float("inf")


class OracleRun:
    """A Llama with adapters on ``spec.projections``; parameter keys are ``layers.<i>.<adapter>.<parameter>``.

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
        self.model = LlamaForCausalLM.from_pretrained(llama_dir, dtype=torch.float32)
        self.model.requires_grad_(False)
        self.params: dict[str, Tensor] = {}
        self.aux: list[Tensor] = []
        self.valid_BS: Tensor | None = None
        self.margin = float("inf")
        for i, layer in enumerate(self.model.model.layers):
            for name, group in spec.adapter_groups:
                for projection in group:
                    linear = getattr(layer.self_attn if projection[0] in "qkvo" else layer.mlp, projection)
                    self._make_parameters(i, name, group, projection, linear, seed)
                    linear.register_forward_hook(self._hook(f"layers.{i}.{name}", group, projection))

    def _make_parameters(
        self, layer: int, name: str, group: Sequence[str], projection: str, linear: torch.nn.Linear, seed: int
    ) -> None:
        for kind in self.spec.parameter_names:
            key = f"layers.{layer}.{name}.{self.spec.stored_name(kind, projection, group)}"
            widths = linear.in_features, linear.out_features
            if kind == "B":
                value = start_of_up_projection(seed, key, self.spec.parameter_shape(kind, *widths))
            else:
                value = initial_parameter(self.spec, kind, *widths, seed, layer, name)
            self.params.setdefault(key, value.requires_grad_(kind not in self.spec.frozen_names))

    def _hook(self, site: str, group: Sequence[str], projection: str) -> Any:
        names = {kind: f"{site}.{self.spec.stored_name(kind, projection, group)}" for kind in self.spec.parameter_names}

        def hook(_module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            (x_BSI,) = args
            params = {kind: self.params[key] for kind, key in names.items()}
            x_TI = x_BSI.flatten(0, 1)
            assert self.valid_BS is not None
            mask_BSI = self.dropout_masks.get((*self.place, site))
            dropped_x_TI = None if mask_BSI is None else x_TI * mask_BSI.flatten(0, 1)
            # megatron flattens [s, b]; tokens are independent, so [b, s] gives the same sums.
            delta, aux = maths.adapter_forward(self.spec, params, x_TI, self.valid_BS.flatten(), dropped_x_TI)
            if projection == group[0]:  # one router, one loss
                self.aux.append(aux)
            if self.spec.is_mixture:
                probs = maths.router_logits(x_BSI.detach(), params["router"]).softmax(-1)
                top = probs[self.valid_BS].topk(min(self.spec.topk + 1, self.spec.num_experts)).values
                if top.shape[-1] > self.spec.topk:
                    self.margin = min(self.margin, float((top[:, -2] - top[:, -1]).min().detach()))
            return output + delta.view_as(output)

        return hook

    def train(self, steps: Sequence[Sequence[Microbatch]], config: TrainConfig) -> Record:
        """AdamW over ``steps``, each a list of the global batch's microbatches."""
        record = Record()
        trainable = {key: p for key, p in self.params.items() if p.requires_grad}
        optimizer = torch.optim.AdamW(
            trainable.values(), config.lr, (config.adam_beta1, config.adam_beta2), config.adam_eps, config.weight_decay
        )
        for step, microbatches in enumerate(steps):
            optimizer.zero_grad()
            record.input_grads.append([])
            answer_tokens = sum(float(m.loss_mask_BS.sum()) for m in microbatches)
            lm_loss = 0.0
            for index, microbatch in enumerate(microbatches):
                self.place = (step, index)
                self.aux.clear()
                self.valid_BS = microbatch.token_task_BS > 0
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
        record.smallest_margin = self.margin
        return record
