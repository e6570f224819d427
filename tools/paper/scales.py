"""The three scales: which base, which data, how many steps and seeds, and how large the adapters are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from experiment import TARGETS, Cell, Domain, Task
from real_tasks import write_real
from tiny_tasks import INTER_DOMAIN, INTRA_DOMAIN, draw

from malora_dist.checkpoint.convert import import_hf
from malora_dist.config_file import load_config
from malora_dist.data.records import write_records
from malora_dist.errors import ConfigError
from malora_dist.methods.comparison import Base, Candidate, as_large_as

ROOT = Path(__file__).resolve().parents[2]
DOMAINS = ("inter_domain", "intra_domain")


@dataclass(frozen=True)
class Scale:
    """What decides the cost of a script.

    Attributes:
        divisor: the paper's ranks and widths are divided by it.
        seeds: of every cell.
        tuning_seeds: others, for choosing learning rates.
        lrs: the grid that every method is tuned on.
        keys: config keys of every run.
        base_steps: training steps of the base, where the scale trains its own.
        domain_keys: {domain: further config keys}.
        tunes_single: whether LoRA is tuned for every task alone; otherwise it takes its rate on the mixture.
        samples: {split: how many of each task}, where the scale draws its own.
        data_seed: draws the tasks' samples.
    """

    name: str
    divisor: int
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    lrs: tuple[float, ...]
    keys: Mapping[str, Any]
    base_steps: int = 0
    domain_keys: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tunes_single: bool = True
    samples: Mapping[str, int] = field(default_factory=dict)
    data_seed: int = 1

    def rank(self, of_paper: int) -> int:
        """The paper's rank or width at this scale."""
        return max(1, round(of_paper / self.divisor))

    def with_steps(self, steps: int) -> Scale:
        """Runs of another length. Shorter ones shrink base, tasks and grid too, where the scale makes them itself: a
        script is then tried in seconds and shows nothing."""
        length = {"train_iters": steps}
        of_domain = {domain: {**keys, **length} for domain, keys in self.domain_keys.items()}
        changed = replace(self, keys={**self.keys, **length}, domain_keys=of_domain)
        if not self.base_steps or steps >= self.keys["train_iters"]:
            return changed
        samples = {"validation": 8, "test": 8, "train": 64}
        return replace(changed, base_steps=20, samples=samples, lrs=self.lrs[1:3])


#: AdamW, warm-up, decay, experts, top-k, balance factor and gates as in the paper (PAPER section 3); no dropout at the
#: small scales, whose runs do not see a sample twice.
_PAPER = {
    "num_lora_experts": 8,
    "topk": 2,
    "norm_topk_prob": False,
    "aux_loss_coeff": 0.01,
    "weight_decay": 0.01,
    "lr_decay_style": "linear",
    "target_modules": list(TARGETS),
    "validation_samples": 0,
}

#: {domain: MALoRA's scale of the start}.
PAPER_BETA = {"inter_domain": 1.0, "intra_domain": 1.25}

SCALES = {
    "tiny": Scale(
        name="tiny",
        divisor=4,
        seeds=tuple(range(1, 9)),
        tuning_seeds=(101, 102),
        lrs=(2e-3, 4e-3, 8e-3, 1.6e-2),
        keys={**_PAPER, "seq_length": 32, "micro_batch_size": 16, "global_batch_size": 16, "train_iters": 400},
        base_steps=500,
        samples={"validation": 60, "test": 100, "train": 1500},
    ),
    "small": Scale(
        name="small",
        divisor=1,
        seeds=(1, 2),
        tuning_seeds=(101,),
        lrs=(2e-4, 5e-4, 1.2e-3, 3e-3),
        keys={
            **_PAPER,
            "seq_length": 256,
            "packing": True,
            "bf16": True,
            "micro_batch_size": 2,
            "global_batch_size": 16,
        },
        # Samples of the inter-domain are three times as long.
        domain_keys={"inter_domain": {"train_iters": 60}, "intra_domain": {"train_iters": 150}},
        tunes_single=False,
    ),
    "gpu": Scale(
        name="gpu",
        divisor=1,
        seeds=(1, 2, 3),
        tuning_seeds=(101,),
        lrs=(1e-4, 2e-4, 4e-4),
        keys={**_PAPER, "bf16": True},
    ),
}


def make_domain(scale: Scale, name: str, out: Path, hf_model: Path | None, data: Path | None) -> Domain:
    """Base and tasks of a scale, made below ``out`` unless they are there.

    Raises:
        ConfigError: the scale needs a model or data that was not named.
    """
    if scale.name == "tiny":
        return _tiny(scale, name, out).with_digest()
    if hf_model is None:
        raise ConfigError("--hf-model", "", f"is needed at --scale {scale.name}", "name a Hugging Face model")
    base = out / f"base_{hf_model.name}"
    if not (base / "malora_base.json").is_file():
        import_hf(hf_model, base)
    if scale.name == "gpu":
        return _gpu(scale, name, base).with_digest()
    if data is None:
        raise ConfigError(
            "--data", "", "is needed at --scale small", "name the folder of the data sets (docs/paper.md)"
        )
    tasks = write_real(name, data, out / "data", scale.data_seed)
    return Domain(name, base, tasks, {**scale.keys, **scale.domain_keys[name]}).with_digest()


def _tiny(scale: Scale, name: str, out: Path) -> Domain:
    """The quickstart's base with two layers, and drawn tasks."""
    base = out / "base_megatron"
    if not (base / "malora_base.json").is_file():
        command = [sys.executable, str(ROOT / "tools" / "make_quickstart.py"), "--out", str(out)]
        options = ["--layers", "2", "--steps", str(scale.base_steps)]
        subprocess.run([*command, *options], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        import_hf(out / "base", base)
    tasks = []
    for task, skill in {"inter_domain": INTER_DOMAIN, "intra_domain": INTRA_DOMAIN}[name].items():
        files = {split: out / name / split / f"{task}.jsonl" for split in scale.samples}
        if not all(file.is_file() for file in files.values()):
            for split, samples in draw(skill, scale.samples, scale.data_seed).items():
                write_records(files[split], map(vars, samples))
        tasks.append(Task(task, files["train"], files["validation"], {task: files["test"]}, "greedy"))
    return Domain(name, base, tuple(tasks), scale.keys)


def _gpu(scale: Scale, name: str, base: Path) -> Domain:
    """The paper's preset, one process per run; validation and test files are expected beside its training files."""
    preset = load_config(ROOT / "configs" / "paper" / f"{name}_malora.yaml")
    tasks = []
    for task in preset.data:
        train = Path(task.path)
        validation, test = (train.with_name(f"{train.stem}_{split}{train.suffix}") for split in ("validation", "test"))
        for file in (train, validation, test):
            if not file.is_file():
                raise ConfigError(f"data[{task.label}].path", str(file), "is not there", "see docs/paper.md")
        tasks.append(Task(task.label, train, validation, {task.label: test}, "greedy"))
    copied = ("global_batch_size", "train_iters", "seq_length", "lora_dropout")
    keys = {**{key: getattr(preset, key) for key in copied}, **scale.keys}
    keys["micro_batch_size"] = keys["global_batch_size"]
    return Domain(name, base, tuple(tasks), keys)


def paper_cells(scale: Scale, domain: Domain) -> dict[str, Cell]:
    """{name: cell} of tables 1 and 2: MALoRA at the paper's widths (divided), every other as large as it can be without
    training more, and MALoRA-Small, which is smaller. The paper's gates are not renormalised over the chosen experts;
    those of this project's default are, hence one row more."""
    beta = PAPER_BETA[domain.name]
    malora = Cell("MALoRA", adapter_keys("malora", scale.rank(12), shared_dim=scale.rank(32), beta=beta))
    small = Cell("MALoRA-Small", adapter_keys("malora", scale.rank(8), shared_dim=scale.rank(22), beta=beta))
    reference = candidate_of(malora, domain.measured)
    others = {
        "LoRA": "lora",
        "AsyLoRA": "asymmetric_lora",
        "DoRA": "dora",
        "MoLoRA": "molora",
        "MoAsyLoRA": "mo_asymmetric_lora",
        "HydraLoRA": "hydralora",
    }
    cells = {
        name: Cell(name, adapter_keys(method, as_large_as(reference, method).spec.declared.rank))
        for name, method in others.items()
    }
    renormalised = malora.but("MALoRA, renormalised", norm_topk_prob=True)
    return {**cells, **{cell.name: cell for cell in (small, malora, renormalised)}}


def candidate_of(cell: Cell, base: Base) -> Candidate:
    """A cell on a base, for counting."""
    overrides = [f"{key}={json.dumps(value)}" for key, value in ({**_PAPER, **cell.keys}).items()]
    return Candidate(cell.name, load_config(None, overrides), base)


def parameters_of(cell: Cell, domain: Domain) -> int:
    """Trainable parameters, routers included."""
    return candidate_of(cell, domain.measured).total


def adapter_keys(method: str, rank: int, **more: Any) -> dict[str, Any]:
    """Config keys of an adapter; alpha is twice the rank, as everywhere in the paper."""
    return {"method": method, "lora_rank": rank, "lora_alpha": 2 * rank, **more}
