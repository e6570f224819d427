"""Losses and accuracies of the validation splits: what transformers would find, on every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from malora_dist.config_file import load_config
from malora_dist.data.dataset import load_tasks
from tests.conftest import write_tasks
from tests.layouts import find
from tests.test_parity import overrides
from tests.workers import WorkerPool


@pytest.fixture(scope="module")
def settings(base_dir: Path, task_files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """With enough validation samples for a random model to be right now and then."""
    held_out = write_tasks(tmp_path_factory.mktemp("held out"), samples=80, seed=7)
    paths = [f"data[{i}].validation_path={file}" for i, file in enumerate(held_out)]
    return overrides(base_dir, task_files, *paths, "eval_iters=35", "lr=0.03")


@torch.no_grad()
def found_by_transformers(llama: Path, settings: list[str]) -> dict[str, float]:
    """Of the base, sample by sample; the first eval_iters * micro_batch_size of each task."""
    config = load_config(None, settings)
    model = LlamaForCausalLM.from_pretrained(llama)
    right: dict[str, list[torch.Tensor]] = {}
    for task in load_tasks(config, AutoTokenizer.from_pretrained(llama), config.seed):
        for sample in task.validation[: config.eval_iters * config.micro_batch_size]:
            token_ids, is_answer = torch.tensor(sample.token_ids), torch.tensor(sample.trained)
            predicted = model(token_ids[None]).logits[0].argmax(-1)
            right.setdefault(task.name, []).append((predicted[:-1] == token_ids[1:])[is_answer[1:]])
    shares = {f"accuracy validation/{task}": torch.cat(parts).double().mean() for task, parts in right.items()}
    every = torch.cat([part for parts in right.values() for part in parts]).double().mean()
    return {name: float(share) for name, share in {"accuracy validation": every, **shares}.items()}


def test_evaluation_on_layouts(settings: list[str], workers: WorkerPool, llama_dir: Path) -> None:
    """Adapters start at zero, so transformers' base is the oracle of the start; later one process is."""
    ((start, end),) = workers.run("jobs_guards:evaluate_around", 1, overrides=settings, steps=4)
    expected = found_by_transformers(llama_dir, settings)
    accuracies = {tag: value for tag, value in start.items() if tag.startswith("accuracy")}
    assert accuracies == pytest.approx(expected)
    assert 0 < expected["accuracy validation"] < end["accuracy validation"] < 1
    for name in ("TP 2", "PP 2", "EP 2"):
        layout = find(name)
        everything = [*settings, *layout.settings]
        for before, after in workers.run(
            "jobs_guards:evaluate_around", layout.processes, overrides=everything, steps=4
        ):
            assert before == pytest.approx(start, rel=1e-4), name
            assert after == pytest.approx(end, rel=1e-4), name


def test_the_first_of_equals_is_predicted(workers: WorkerPool) -> None:
    """Also where they lie on two ranks."""
    rows = ["0 3 1 3", "5 5 5 5", "1 0 2 2", "0 0 -1 0.5", "-3 -2 -2 -9"]
    logits = torch.tensor([[float(number) for number in row.split()] for row in rows])
    for size in (1, 2, 4):
        for said in workers.run("jobs_guards:predictions", size, logits=logits):
            assert said == [1, 0, 2, 3, 1]
