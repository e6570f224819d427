"""One-process reference of a training run: transformers' Llama, malora_dist.adapters on plain tensors, torch's AdamW.

Nothing of megatron, the dispatchers or the trainer is in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from malora_dist.adapters import maths
from malora_dist.adapters.init import initial_parameter, keyed_generator
from malora_dist.adapters.spec import AdapterSpec
from malora_dist.config import TrainConfig
from malora_dist.data.batches import Microbatch


def start_value(spec: AdapterSpec, seed: int, layer: int, projection: str, name: str, n: int, m: int) -> Tensor:
    """The start of a parameter in parity tests: B random instead of zero, so that every gradient is alive."""
    value = initial_parameter(spec, name, n, m, seed, layer, projection)
    if name == "B":
        value = 0.1 * torch.randn(value.shape, generator=keyed_generator(seed, "test B", layer, projection))
    return value


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
    """A Llama with adapters on ``spec.projections``; adapter keys are ``layers.<i>.<projection>.<name>``."""

    def __init__(self, llama_dir: Path, spec: AdapterSpec, seed: int) -> None:
        self.spec = spec
        self.model = LlamaForCausalLM.from_pretrained(llama_dir, dtype=torch.float32)
        self.model.requires_grad_(False)
        self.params: dict[str, Tensor] = {}
        self.aux: list[Tensor] = []
        self.valid_BS: Tensor | None = None
        self.margin = float("inf")
        for i, layer in enumerate(self.model.model.layers):
            for projection in spec.projections:
                linear = getattr(layer.self_attn if projection[0] in "qkvo" else layer.mlp, projection)
                site = f"layers.{i}.{projection}"
                for name in spec.parameter_names:
                    value = start_value(spec, seed, i, projection, name, linear.in_features, linear.out_features)
                    self.params[f"{site}.{name}"] = value.requires_grad_(name not in spec.frozen_names)
                linear.register_forward_hook(self._hook(site))

    def _hook(self, site: str) -> Any:
        def hook(_module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            (x_BSI,) = args
            params = {name: self.params[f"{site}.{name}"] for name in self.spec.parameter_names}
            # megatron flattens [s, b]; tokens are independent, so [b, s] gives the same sums.
            assert self.valid_BS is not None
            delta, aux = maths.adapter_forward(self.spec, params, x_BSI.flatten(0, 1), self.valid_BS.flatten())
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
        for microbatches in steps:
            optimizer.zero_grad()
            record.input_grads.append([])
            answer_tokens = sum(float(m.loss_mask_BS.sum()) for m in microbatches)
            lm_loss = 0.0
            for microbatch in microbatches:
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
