"""Jobs of tests/test_packing.py."""

from __future__ import annotations

import torch
from torch import Tensor

from malora_dist.data.batches import Microbatch
from malora_dist.parallel import topology as layout
from malora_dist.parallel.device import without_expected_warnings
from tests.jobs import _randomise_zeros, _trainer


def logits(overrides: list[str], microbatches: list[Microbatch], randomise: bool) -> list[Tensor]:
    """The model's logits [B, S, V] of each microbatch; ``randomise``: with adapters that do something."""
    trainer = _trainer(overrides)
    from malora_dist.layers.token_info import TokenInfo

    try:
        if randomise:
            _randomise_zeros(trainer)
        (model,) = trainer.trained.model
        model.eval()
        with torch.no_grad():
            infos = [TokenInfo(tasks_BS=m.token_task_BS, documents_BS=m.document_BS) for m in microbatches]
            return [
                model(m.tokens_BS, m.position_ids_BS, None, packed_seq_params=info)
                for m, info in zip(microbatches, infos, strict=True)
            ]
    finally:
        layout.destroy()


def document_masks(documents: list[Tensor | None]) -> list[Tensor | None]:
    """Attention masks of documents [B, S]; here, because the tests' own process does without megatron-core."""
    with without_expected_warnings():
        from malora_dist.layers.token_info import document_mask
    return [document_mask(documents_BS) for documents_BS in documents]


def task_losses(overrides: list[str]) -> tuple[dict[str, float], dict[str, float]]:
    """By task at the start of training: (of the validation splits, of the first step)."""
    trainer = _trainer(overrides)
    try:
        return trainer.evaluate().losses.by_task, trainer.train_step().losses.by_task
    finally:
        layout.destroy()
