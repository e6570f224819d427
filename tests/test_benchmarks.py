"""What tools/benchmarks/ counts and compares: floors against formulas, and the usual ways against our own."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from malora_dist.config_file import load_config
from malora_dist.families.base import projection_widths
from malora_dist.families.shapes import released_config
from malora_dist.methods.budget import total

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "tools" / "benchmarks"


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, ModuleType]]:
    """{name: module}; the scripts import each other from their own folder."""
    sys.path.insert(0, str(BENCHMARKS))
    yield {name: importlib.import_module(name) for name in ("models", "settings", "step_time")}
    sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize("setting", ["paper", "rank8"])
def test_settings_have_every_contender(modules: dict[str, ModuleType], setting: str) -> None:
    for name, contender in modules["step_time"].CONTENDERS.items():
        spec = modules["settings"].SETTINGS[setting].spec(contender.method)
        spec.validate_adapter()
        assert spec.declared.scaling == 2.0, name


def test_the_paper_s_methods_train_about_as_many_parameters(modules: dict[str, ModuleType]) -> None:
    """On Llama-2 7B's shapes the paper's 143.1, 151.2 and 158.9 million."""
    paper, widths = modules["settings"].SETTINGS["paper"], projection_widths(released_config("llama2-7b"))
    millions = [total(paper.spec(name), widths, 32) / 1e6 for name in ("lora", "molora", "malora")]
    assert millions == pytest.approx([143.1, 151.2, 158.9], abs=0.06)


@pytest.mark.parametrize("method", ["lora", "asymmetric_lora", "dora", "molora", "malora"])
def test_the_paper_s_setting_is_that_of_its_configs(modules: dict[str, ModuleType], method: str) -> None:
    config = load_config(ROOT / "configs" / "paper" / f"inter_domain_{method}.yaml", []).adapter_fields()
    keys = modules["settings"].SETTINGS["paper"].keys(method)
    if method != "malora":
        del keys["shared_dim"]  # there a default that is not used
    assert {key: config[key] for key in keys} == keys


class Losses:
    """Lives in a process of its own, with the process group of its trainers."""

    def of(self, directory: Path, names: list[str], steps: int) -> dict[str, list[float]]:
        """{contender: loss of each step} on one tiny Llama and the same two samples."""
        models, step_time = importlib.import_module("models"), importlib.import_module("step_time")
        setting = importlib.import_module("settings").SETTINGS["paper"]
        inputs = models.write_inputs(directory, models.llama_like(64, 1, vocab=64, head_dim=16), 32, samples=2)
        losses: dict[str, list[float]] = {}
        topology: Any = None
        for name in names:
            contender = step_time.CONTENDERS[name]
            keys = [*setting.overrides(contender.method), *contender.keys, "device=cpu", "lr=0.01"]
            trainer = models.build_trainer(inputs.overrides(*keys, global_batch_size=2), topology)
            topology = trainer.topology
            if contender.patch is not None:
                contender.patch(trainer)
            losses[name] = [trainer.train_step().losses.overall for _ in range(steps)]
        return losses


def test_the_usual_ways_learn_the_same(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    """The yardsticks compute what they are compared with: float32 losses of three steps, B away from zero."""
    names = ["dora", "usual_dora", "molora", "usual_molora"]
    with modules["models"].spawn(Losses, 1) as process:
        (losses,) = process.call("of", tmp_path, names, steps=3)
    for ours, usual in (names[:2], names[2:]):
        torch.testing.assert_close(losses[usual], losses[ours], rtol=1e-4, atol=0)
        assert losses[ours][-1] < losses[ours][0] - 0.01, "nothing was learned"
