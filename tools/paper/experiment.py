"""What the scripts of this folder train: a scale's bases and tasks, a cell of a table, and one run of it.

A *cell* is an adapter as config keys. A *run* is a cell on a domain's tasks at one learning rate and seed; its
identity is everything that decides its result, so that equal runs of different scripts are made once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from malora_dist.checkpoint.base import hf_dir, read_base_info
from malora_dist.config import Config
from malora_dist.config_file import load_config
from malora_dist.families.base import family_of, projection_widths
from malora_dist.families.shapes import base_parameters
from malora_dist.methods.comparison import Base

#: What the paper adapts: its parameter counts agree only without o_proj.
TARGETS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Task:
    """One task's files.

    Attributes:
        kind: ``greedy``: a test question counts where the greedy answer is the right one; ``choice``: where the right
            option is the likeliest; ``loss``: only the loss of the answer is taken.
        tests: {name: file} of the test sets, which may be several.
    """

    name: str
    train: Path
    validation: Path
    tests: Mapping[str, Path]
    kind: str


@dataclass(frozen=True)
class Domain:
    """Tasks that are trained together, and the settings they share.

    Attributes:
        name: ``inter_domain`` or ``intra_domain``.
        base: a converted base.
        keys: config keys of every run.
        digest: identity of base and files.
    """

    name: str
    base: Path
    tasks: tuple[Task, ...]
    keys: Mapping[str, Any]
    digest: str = field(default="", compare=False)

    def with_digest(self) -> Domain:
        """Itself, once its files are there."""
        found = hashlib.sha256(read_base_info(self.base).fingerprint.encode())
        for task in self.tasks:
            for file in (task.train, task.validation, *task.tests.values()):
                found.update(file.read_bytes())
        return replace(self, digest=found.hexdigest()[:16])

    def only(self, task: str) -> Domain:
        """The same with one of its tasks, trained with as many of its samples as in the mixture.

        The batch shrinks as far as it can, so that there are more steps than the number of tasks would leave.
        """
        batch, steps = self.keys["global_batch_size"], self.keys["train_iters"]
        smaller = max(batch // len(self.tasks), min(4, batch))
        keys = {
            **self.keys,
            "global_batch_size": smaller,
            "micro_batch_size": min(self.keys["micro_batch_size"], smaller),
            "train_iters": max(2, round(steps * batch / len(self.tasks) / smaller)),
        }
        return replace(self, tasks=tuple(t for t in self.tasks if t.name == task), keys=keys)

    @property
    def measured(self) -> Base:
        """The base, for counting parameters."""
        hf = family_of(hf_dir(self.base)).hf
        return Base(projection_widths(hf), hf.num_hidden_layers, base_parameters(hf))


@dataclass(frozen=True)
class Cell:
    """A row of a table: an adapter under the name it has there."""

    name: str
    keys: Mapping[str, Any]

    def but(self, name: str, **keys: Any) -> Cell:
        """Another row, with other values of some keys."""
        return Cell(name, {**self.keys, **keys})


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        keeps_adapter: its parameters are written beside its result.
        is_tried: for tuning; its test sets are left alone.
    """

    domain: Domain
    cell: Cell
    lr: float
    seed: int
    keeps_adapter: bool = False
    is_tried: bool = False

    @property
    def overrides(self) -> list[str]:
        """Config keys of the run, ``key=value``."""
        data = [
            {"name": task.name, "path": str(task.train), "validation_path": str(task.validation)}
            for task in self.domain.tasks
        ]
        steps = self.domain.keys["train_iters"]
        keys = {
            "pretrained_checkpoint": str(self.domain.base),
            "data": data,
            "eval_iters": 0,
            "lr_warmup_iters": max(steps // 10, 1) if steps > 1 else 0,
            **self.domain.keys,
            **self.cell.keys,
            "lr": self.lr,
            "seed": self.seed,
        }
        return [f"{key}={json.dumps(value)}" for key, value in keys.items()]

    @property
    def config(self) -> Config:
        """The run as training sees it."""
        return load_config(None, self.overrides)

    @property
    def identity(self) -> str:
        """Equal for equal runs, whatever their cell is called."""
        decisive = {
            "digest": self.domain.digest,
            "tasks": [task.name for task in self.domain.tasks],
            "domain": dict(self.domain.keys),
            "cell": dict(self.cell.keys),
            "lr": self.lr,
            "seed": self.seed,
        }
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]
