"""Training the PEFT tuner with transformers: the auxiliary loss is counted once, what is frozen stays so."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import Trainer, TrainingArguments

from malora_dist.hf import MaloraLayer
from tests.hf_models import TUNED, adapted, adapter_config, assert_same_gradients, batch, parameters_of, tiny_llama

#: (method, freeze, what then never trains)
FROZEN: list[tuple[str, list[str], set[str]]] = [
    ("mo_asymmetric_lora", [], {"A"}),
    ("malora", ["S"], {"S"}),
    ("malora", ["router", "P"], {"router", "P"}),
    ("malora_b", ["A"], {"A"}),
]


class Samples(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self, rows: list[dict[str, Tensor]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return self.rows[i]


def train(
    model: PeftModel, rows: list[dict[str, Tensor]], accumulation: int, directory: Path
) -> tuple[float, dict[str, Tensor]]:
    """One optimizer step of transformers' Trainer over all rows: (logged loss, trained parameters)."""
    arguments = TrainingArguments(
        output_dir=str(directory),
        per_device_train_batch_size=len(rows) // accumulation,
        max_steps=1,
        logging_steps=1,
        gradient_accumulation_steps=accumulation,
        optim="sgd",
        learning_rate=1.0,
        max_grad_norm=0.0,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        lr_scheduler_type="constant",
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Samples(rows))
    trainer.train()
    logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return logged, {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def test_trainer_counts_the_auxiliary_loss_once_per_step(tmp_path: Path) -> None:
    """Four equal samples: the product of averages is then the same for one batch of 4 and for 4 microbatches of 1."""
    row = {k: v[0] for k, v in batch(rows=1, length=8).items()}
    row["labels"][:3] = -100
    results = [train(adapted(aux_loss_coeff=1.0), [row] * 4, steps, tmp_path) for steps in (1, 4)]
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)
    assert_same_gradients(results[0][1], results[1][1])


def test_trainer_weights_microbatches_by_their_answer_tokens(tmp_path: Path) -> None:
    rows = [{k: v[0] for k, v in batch(rows=1, length=8, seed=s).items()} for s in (3, 4)]
    rows[0]["labels"][:6] = -100  # 2 and 7 answer tokens: position 0 is never a target
    model = adapted(aux_loss_coeff=1.0).train()
    both = [model(**{k: v.unsqueeze(0) for k, v in row.items()}).loss.item() for row in rows]
    logged, _ = train(copy.deepcopy(model), rows, 2, tmp_path)
    assert logged == pytest.approx((2 * both[0] + 7 * both[1]) / 9, rel=1e-3)


def trained_names(model: torch.nn.Module, adapter: str = "default") -> set[str]:
    """Names of the adapter's parameters that want a gradient; the same in every layer."""
    layers = [m for m in model.modules() if isinstance(m, MaloraLayer) and adapter in m.adapter_configs]
    by_layer = [{name for name, p in parameters_of(layer, adapter).items() if p.requires_grad} for layer in layers]
    assert all(names == by_layer[0] for names in by_layer)
    return by_layer[0]


@pytest.mark.parametrize(("method", "freeze", "frozen"), FROZEN)
def test_frozen_parameters_stay_frozen_whatever_peft_switches(
    method: str, freeze: list[str], frozen: set[str], tmp_path: Path
) -> None:
    trained = set(TUNED[method]) - frozen
    model = adapted(method, freeze=freeze)
    assert trained_names(model) == trained
    model.set_adapter("default")
    assert trained_names(model) == trained
    with model.disable_adapter():
        assert trained_names(model) == set()
    assert trained_names(model) == trained
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()
    assert trained_names(model) == trained
    model.add_adapter("second", adapter_config("molora"))
    assert trained_names(model) == trained
    model.set_adapter("second")
    assert (trained_names(model), trained_names(model, "second")) == (set(), {"router", "A", "B"})
    model.set_requires_grad("default")
    assert trained_names(model) == trained
    model.set_adapter("default")
    model.delete_adapter("second")
    assert trained_names(model) == trained
    model.save_pretrained(tmp_path)
    for low_cpu_mem in (False, True):
        options = {"is_trainable": True, "low_cpu_mem_usage": low_cpu_mem}
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, **options)
        assert trained_names(loaded) == trained
        loaded.load_adapter(tmp_path, "again", **options)
        assert trained_names(loaded, "again") == trained
    assert trained_names(PeftModel.from_pretrained(tiny_llama(), tmp_path)) == set()


@pytest.mark.parametrize(("method", "freeze", "frozen"), FROZEN)
def test_frozen_parameters_are_not_trained(method: str, freeze: list[str], frozen: set[str], tmp_path: Path) -> None:
    model = adapted(method, freeze=freeze)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    rows = [{k: v[0] for k, v in batch(rows=1, length=8, seed=seed).items()} for seed in (3, 4)]
    train(model, rows, 1, tmp_path)
    changed = {n.split(".")[-2] for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {f"malora_{name}" for name in TUNED[method] if name not in frozen}
