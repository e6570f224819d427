"""Tasks ready to train on: read, rendered, tokenised, fitted and split."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from malora_dist.config import DataConfig, TaskConfig
from malora_dist.data.formats import load_examples
from malora_dist.data.schedule import keyed_permutation
from malora_dist.data.tokenization import TokenizedExample, encode_example, fit
from malora_dist.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: At most one sample in so many is held out.
_HELD_OUT = 5


@dataclass(frozen=True)
class TaskDataset:
    """One task's samples.

    Attributes:
        weight: its mixing weight.
        overlong: samples above seq_length, truncated or dropped, in both splits.
        blank: samples left out for their empty answer, in both splits.
    """

    name: str
    weight: float
    train: list[TokenizedExample]
    validation: list[TokenizedExample]
    overlong: int
    blank: int

    @property
    def report(self) -> str:
        """The counts in one line, for the log; tokens are those of the training samples."""
        tokens = sum(len(sample.token_ids) for sample in self.train)
        trained = sum(sum(sample.trained) for sample in self.train)
        return (
            f"{self.name}: {len(self.train):,} training and {len(self.validation):,} validation samples, "
            f"{tokens:,} tokens ({trained:,} trained), {self.overlong:,} overlong, {self.blank:,} blank answers"
        )


def load_tasks(config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[TaskDataset]:
    """All tasks of a config, in its order.

    A task's validation split is its validation_path or, without one, ``validation_samples``
    samples held out of its training file: at most a fifth of it, chosen by seed and task name.

    Raises:
        DataError: a file or record that cannot be used, or a task without training samples.
        ConfigError: format, prompt_template or validation_path cannot work.
    """
    return [_load_task(task, config, tokenizer, seed) for task in config.data]


def split_off(
    samples: Sequence[TokenizedExample], count: int, seed: int, name: str
) -> tuple[list[TokenizedExample], list[TokenizedExample]]:
    """(train, validation): up to ``count`` samples held out, both in the order they came in."""
    count = min(count, len(samples) // _HELD_OUT)
    held_out = set(keyed_permutation(len(samples), seed, "validation", name)[:count].tolist())
    train = [sample for i, sample in enumerate(samples) if i not in held_out]
    return train, [samples[i] for i in sorted(held_out)]


def _load_task(task: TaskConfig, config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> TaskDataset:
    name = task.label
    if task.validation_path and Path(task.validation_path).resolve() == Path(task.path).resolve():
        rule = "is the task's training file"
        cure = "name another file, or remove it to hold samples out"
        raise ConfigError(f"data[{name}].validation_path", task.validation_path, rule, cure)
    train, overlong, blank = _samples(task, config, tokenizer)
    if not train:
        raise DataError(
            f"{task.path}: leaves task {name!r} no samples ({blank} without an answer, {overlong} above "
            f"seq_length={config.seq_length} with overlong={config.overlong}); raise seq_length or mend the file"
        )
    if task.validation_path:
        there = dataclasses.replace(task, path=task.validation_path)
        validation, more_overlong, more_blank = _samples(there, config, tokenizer)
        return TaskDataset(name, task.weight, train, validation, overlong + more_overlong, blank + more_blank)
    train, validation = split_off(train, config.validation_samples, seed, name)
    return TaskDataset(name, task.weight, train, validation, overlong, blank)


def _samples(
    task: TaskConfig, config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[TokenizedExample], int, int]:
    """(samples, how many were overlong, how many were left out for a blank answer)."""
    examples = load_examples(task, tokenizer)
    answered = [example for example in examples if example.answer.strip()]
    encoded = [encode_example(example, tokenizer) for example in answered]
    fitted = [fit(sample, config.seq_length, config.overlong) for sample in encoded]
    overlong = sum(len(sample.token_ids) > config.seq_length for sample in encoded)
    return [sample for sample in fitted if sample is not None], overlong, len(examples) - len(answered)
