"""configs/paper: every file loads, fits its processes, and has the settings of the paper (arXiv 2410.22782)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from malora_dist.config import Config
from malora_dist.config_file import load_config
from malora_dist.families.base import projection_widths
from malora_dist.families.shapes import base_parameters, released_config
from malora_dist.methods.budget import total, trained_share
from malora_dist.methods.spec import AdapterSpec

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
FOLDER = ROOT / "configs" / "paper"
#: Files that others include.
PARTS = {"common", "inter_domain", "intra_domain"}
LLAMA2 = released_config("llama2-7b")


class Adapter(NamedTuple):
    """Rank, d where there is one, and percent of all parameters that are trained."""

    method: str
    rank: int
    shared_dim: int | None
    percent: float


ADAPTERS = {
    "lora": Adapter("lora", 64, None, 2.1),
    "asymmetric_lora": Adapter("asymmetric_lora", 128, None, 2.2),
    "dora": Adapter("dora", 64, None, 2.1),
    "molora": Adapter("molora", 8, None, 2.2),
    "mo_asymmetric_lora": Adapter("mo_asymmetric_lora", 16, None, 2.4),  # by formula: the paper has no figure
    "malora": Adapter("malora", 12, 32, 2.3),
    "malora_small": Adapter("malora", 8, 22, 1.6),
}


class Setting(NamedTuple):
    """Samples of all tasks together and what the paper's training does with them."""

    samples: int
    tasks: int
    lr: float
    batch: int
    epochs: int
    beta: float
    four_processes: list[str]


SETTINGS = {
    "inter_domain": Setting(6 * 30_000, 6, 5e-4, 4, 3, 1.0, []),
    "intra_domain": Setting(
        1120 + 2250 + 16100 + 4957 + 9427, 5, 4e-4, 2, 2, 1.25,
        ["tensor_model_parallel_size=2", "sequence_parallel=true"],
    ),
}  # fmt: skip
FILES = [(setting, name) for setting in SETTINGS for name in ADAPTERS]


def load(setting: str, name: str, *overrides: str) -> Config:
    return load_config(FOLDER / f"{setting}_{name}.yaml", overrides)


def test_the_folder_has_every_setting_with_every_method() -> None:
    assert {file.stem for file in FOLDER.iterdir()} == PARTS | {"_".join(pair) for pair in FILES}


@pytest.mark.parametrize(("setting", "name"), FILES)
def test_it_fits_one_and_four_processes(setting: str, name: str) -> None:
    load(setting, name).validate(1)
    load(setting, name, *SETTINGS[setting].four_processes).validate(4)
    if load(setting, name).is_mixture:
        dp = 4 // (2 if SETTINGS[setting].four_processes else 1)
        load(setting, name, *SETTINGS[setting].four_processes, f"expert_model_parallel_size={dp}").validate(4)


@pytest.mark.parametrize(("setting", "name"), FILES)
def test_the_adapter_is_the_papers(setting: str, name: str) -> None:
    config, expected = load(setting, name), ADAPTERS[name]
    assert (config.method, config.lora_rank, config.lora_alpha) == (expected.method, expected.rank, 2 * expected.rank)
    assert config.declared.scaling == 2.0
    if expected.shared_dim is not None:
        assert config.shared_dim == expected.shared_dim
    if config.is_mixture:
        assert (config.num_experts, config.topk, config.norm_topk_prob, config.aux_loss_coeff) == (8, 2, False, 0.01)
    assert config.lora_dropout == 0.05
    assert config.beta == SETTINGS[setting].beta
    assert config.projections == ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")

    share = trained_share(config, projection_widths(LLAMA2), LLAMA2.num_hidden_layers, base_parameters(LLAMA2))
    assert round(100 * share, 1) == expected.percent
    header = (FOLDER / f"{setting}_{name}.yaml").read_text(encoding="utf-8")
    assert re.search(r"([\d.]+)% of the parameters", header)[1] == str(expected.percent)  # type: ignore[index]


@pytest.mark.parametrize(("setting", "name"), FILES)
def test_the_training_is_the_papers(setting: str, name: str) -> None:
    config, expected = load(setting, name), SETTINGS[setting]
    assert (config.lr, config.global_batch_size, config.weight_decay) == (expected.lr, expected.batch, 0.01)
    assert config.train_iters == expected.epochs * expected.samples // expected.batch
    assert config.lr_warmup_iters == config.train_iters // 10
    assert len(config.data) == expected.tasks
    assert all(task.path.startswith("data/") for task in config.data)
    assert config.save == f"runs/paper/{setting}/{name}"


def test_sizes_in_the_readme_are_those_of_the_formula() -> None:
    """Cells such as "r 12: 158.9 M" or "r 8, d 22: 109.1 M" in the rows of the methods."""
    targets = load("inter_domain", "malora").target_modules
    rows = re.findall(r"^\| `(\w+)` .* \| (r \d.*) \|$", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert [method for method, _ in rows] == [
        "lora", "asymmetric_lora", "dora", "molora", "mo_asymmetric_lora", "malora",
    ]  # fmt: skip
    for method, cell in rows:
        for rank, shared_dim, millions in re.findall(r"r (\d+)(?:, d (\d+))?: ([\d.]+) M", cell):
            spec = AdapterSpec(method=method, lora_rank=int(rank), target_modules=targets)
            spec.shared_dim = int(shared_dim or spec.shared_dim)
            count = total(spec, projection_widths(LLAMA2), LLAMA2.num_hidden_layers)
            assert f"{count / 1e6:.1f}" == millions, (method, cell)


def test_every_sample_is_seen_as_often_as_every_other() -> None:
    """Tasks of one size are mixed evenly, others by their sizes."""
    assert {task.weight for task in load("inter_domain", "malora").data} == {1.0}
    assert sum(task.weight for task in load("intra_domain", "malora").data) == SETTINGS["intra_domain"].samples
