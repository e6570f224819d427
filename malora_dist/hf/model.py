"""The PEFT tuner: puts MaloraLayers into a Llama and adds their load-balancing loss to its loss."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from malora_dist.errors import ConfigError
from malora_dist.hf.config import MaloraConfig
from malora_dist.hf.keys import SAVED_PREFIX, check_tensors
from malora_dist.hf.layer import MaloraLayer, RoutedTokens, unmergeable
from malora_dist.methods.routing import load_balancing_loss, routing_sums

_IGNORED_LABEL = -100


class MaloraModel(BaseTuner):
    """The methods with a router for ``peft.get_peft_model``; see :class:`MaloraConfig`.

    In training mode, with labels, the load-balancing losses of all adapted linears join
    ``outputs.loss``. Gradient checkpointing has to be non-reentrant.
    """

    prefix = "malora_"
    tuner_layer_cls = MaloraLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - PEFT's interface; MaloraConfig fills the targets

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, MaloraConfig)
        match = re.search(r"\blayers\.(\d+)\.", current_key)
        if match is None:
            raise ConfigError(
                "target_modules",
                target_name,
                f"matches {current_key}, which lies in no numbered layer",
                "adapt a decoder with numbered layers",
            )
        layer_number = int(match[1])
        if isinstance(target, MaloraLayer):
            target.update_layer(adapter_name, peft_config, layer_number, target_name)
        elif isinstance(target, nn.Linear):
            layer = MaloraLayer(target)
            layer.update_layer(adapter_name, peft_config, layer_number, target_name)
            self._replace_module(parent, target_name, layer, target)
        else:
            raise ConfigError(
                "target_modules",
                target_name,
                f"matches {current_key}, a {type(target).__name__}",
                "only torch.nn.Linear can be adapted",
            )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward; in training mode with labels its loss includes the load-balancing loss.

        Raises:
            ConfigError: reentrant checkpointing, or an attention mask that does not tell padding.
        """
        names = inspect.signature(self.model.forward).parameters if args else ()
        given = dict(zip(names, args, strict=False)) | kwargs
        if not self.training or given.get("labels") is None:
            return super().forward(*args, **kwargs)
        with self._routing_log() as log:
            outputs = super().forward(*args, **kwargs)
        if not log:
            return outputs
        labels, loss = given["labels"], outputs[0]
        auxiliary = _auxiliary_loss(log, given.get("attention_mask"), labels.shape[0], loss.device)
        loss = loss + _batch_share(labels, given.get("num_items_in_batch")) * auxiliary
        if isinstance(outputs, tuple):  # return_dict=False
            return (loss, *outputs[1:])
        outputs.loss = loss
        return outputs

    @contextmanager
    def _routing_log(self) -> Iterator[list[RoutedTokens]]:
        """Let this model's layers note their routings while the context lasts."""
        log: list[RoutedTokens] = []
        layers = [m for m in self.model.modules() if isinstance(m, MaloraLayer)]
        for layer in layers:
            layer.routing_log = log
        try:
            yield log
        finally:
            for layer in layers:
                layer.routing_log = None

    def _check_merge_allowed(self) -> None:
        raise unmergeable()

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's last word before load_state_dict(strict=False): here missing and unexpected keys are errors.

        Raises:
            CheckpointError: listing missing keys, unexpected keys and other shapes.
        """
        assert isinstance(config, MaloraConfig)
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        present = {key: value.shape for key, value in model.state_dict().items()}
        found = {key if key in present else key.removeprefix(SAVED_PREFIX): v.shape for key, v in remapped.items()}
        suffixes = tuple(f".{cls.prefix}{name}.{adapter_name}" for name in config.declared.parameters)
        # Beside the adapter itself a checkpoint may hold modules_to_save and resized embeddings of the model.
        expected = {key: shape for key, shape in present.items() if key.endswith(suffixes) or key in found}
        check_tensors(
            f"adapter {adapter_name!r}", expected, found, "the file is incomplete or belongs to another base or config"
        )
        return remapped


def _auxiliary_loss(
    log: list[RoutedTokens], attention_mask: Tensor | None, batch_size: int, device: torch.device
) -> Tensor:
    """Sum of the load-balancing losses over the adapted linears of one forward pass. float32 []"""
    total = torch.zeros((), device=device)
    for config, routing, trains_router in log:
        if trains_router and torch.is_grad_enabled() and not routing.probs_TN.requires_grad:
            raise ConfigError(
                "use_reentrant",
                True,
                "reentrant gradient checkpointing hides the load-balancing loss from autograd",
                'set gradient_checkpointing_kwargs={"use_reentrant": False}',
            )
        valid_T = _valid_tokens(attention_mask, batch_size, routing.probs_TN)
        total = total + load_balancing_loss(config.declared, *routing_sums(routing, valid_T)).to(device)
    return total


def _valid_tokens(attention_mask: Tensor | None, batch_size: int, probs_TN: Tensor) -> Tensor | None:
    """False on padding. The mask may start with cached tokens, which are not routed in this pass. bool [T]"""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise ConfigError(
            "attention_mask",
            tuple(attention_mask.shape),
            "must be of shape [batch, sequence], so that the load-balancing loss can skip padding",
            "pass such a mask, or set aux_loss_coeff=0",
        )
    length = probs_TN.shape[0] // batch_size
    return attention_mask[:, -length:].reshape(-1).to(probs_TN.device, torch.bool)


def _batch_share(labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor | float:
    """This microbatch's share of the optimizer step's target tokens.

    transformers' Trainer passes `num_items_in_batch` when it sums microbatch losses that the model
    has already divided by that number. The auxiliary loss then has to take the same share as the
    language-model loss, or it would count once per accumulation step. Without the argument the
    loss is a mean, and whoever accumulates divides it.
    """
    if num_items_in_batch is None:
        return 1.0
    return (labels[..., 1:] != _IGNORED_LABEL).sum() / torch.as_tensor(num_items_in_batch, device=labels.device)
