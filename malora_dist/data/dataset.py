"""Tasks ready to train on: read, rendered, tokenised, fitted and split."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from malora_dist.config_sections import DataConfig, TaskConfig
from malora_dist.data.data_files import is_data_file
from malora_dist.data.formats import load_examples
from malora_dist.data.reading import Reading
from malora_dist.data.schedule import keyed_permutation
from malora_dist.data.tokenization import TokenizedExample, encode_example, fit
from malora_dist.errors import ConfigError, DataError
from malora_dist.files import is_same_file
from malora_dist.progress import Progress

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
        skipped: records left out because they cannot be used, in both splits; only with ``corrupt_data: skip``.
        skip_reasons: why, for the first few of each split.
        special_tokens: what is to be told of special tokens that the text spells, a line per split that has some.
        fingerprints: {``train`` or ``validation``: SHA-256 of what was read for it, ``split``: SHA-256 of which
            records are in which of the two}.
    """

    name: str
    weight: float
    train: list[TokenizedExample]
    validation: list[TokenizedExample]
    overlong: int
    blank: int
    skipped: int = 0
    skip_reasons: list[str] = dataclasses.field(default_factory=list)
    special_tokens: list[str] = dataclasses.field(default_factory=list)
    fingerprints: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def report(self) -> str:
        """The counts in one line, for the log, what was skipped, and special tokens in the text.

        Tokens are those of the training samples.
        """
        tokens = sum(len(sample.token_ids) for sample in self.train)
        trained = sum(sum(sample.trained) for sample in self.train)
        skipped = [f", {self.skipped:,} corrupt and skipped, for example", *self.skip_reasons] if self.skipped else []
        return (
            f"{self.name}: {len(self.train):,} training and {len(self.validation):,} validation samples, "
            f"{tokens:,} tokens ({trained:,} trained), {self.overlong:,} overlong, {self.blank:,} blank answers"
            + "\n".join(skipped)
            + "".join(f"\n{line}" for line in self.special_tokens)
        )


def load_tasks(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int, progress: Progress | None = None
) -> list[TaskDataset]:
    """All tasks of a config, in its order.

    A task's validation split is its validation_path or, without one, ``validation_samples``
    samples held out of its training file: at most a fifth of it, chosen by seed and task name.

    Raises:
        DataError: a file or record that cannot be used, or a task without training samples.
        ConfigError: format, prompt_template or validation_path cannot work.
    """
    progress = progress or Progress(is_shown=False)
    for task in config.data:  # before the first of them is read, which may take long
        _check_paths(task)
    return [_load_task(task, config, tokenizer, seed, progress) for task in config.data]


def split_off(
    samples: Sequence[TokenizedExample], count: int, seed: int, name: str
) -> tuple[list[TokenizedExample], list[TokenizedExample]]:
    """(train, validation): up to ``count`` samples held out, both in the order they came in."""
    count = min(count, len(samples) // _HELD_OUT)
    held_out = set(keyed_permutation(len(samples), seed, "validation", name)[:count].tolist())
    train = [sample for i, sample in enumerate(samples) if i not in held_out]
    return train, [samples[i] for i in sorted(held_out)]


def data_fingerprints(tasks: Sequence[TaskDataset]) -> dict[str, str]:
    """{``TASK/`` and a key of its fingerprints: the fingerprint}; validation only if it has a file."""
    return {f"{task.name}/{split}": digest for task in tasks for split, digest in task.fingerprints.items()}


def data_paths(config: DataConfig) -> dict[str, str]:
    """{key of :func:`data_fingerprints` that stands for a file: the path that the config names there}."""
    named = [(f"{task.label}/train", task.path) for task in config.data]
    named += [(f"{task.label}/validation", task.validation_path) for task in config.data if task.validation_path]
    return dict(named)


@dataclass(frozen=True)
class _Split:
    """What came of one file.

    Attributes:
        overlong: how many samples were above seq_length.
        blank: how many were left out for a blank answer.
    """

    samples: list[TokenizedExample]
    overlong: int
    blank: int
    reading: Reading


def _check_paths(task: TaskConfig) -> None:
    """Refuse paths that cannot be those of a task; opens nothing."""
    if is_data_file(task.path) and task.subset:
        rule = f"{task.path} is a file, which has no subsets"
        raise ConfigError(f"data[{task.label}].subset", task.subset, rule, "remove it")
    if task.validation_path and is_same_file(task.validation_path, task.path):
        rule = "is the task's training file"
        cure = "name another file, or remove it to hold samples out"
        raise ConfigError(f"data[{task.label}].validation_path", task.validation_path, rule, cure)
    if task.validation_path:
        is_data_file(task.validation_path)


def _load_task(
    task: TaskConfig, config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int, progress: Progress
) -> TaskDataset:
    name = task.label
    read = _read_split(task, config, tokenizer, progress)
    if not read.samples:
        raise DataError(
            f"{task.path}: leaves task {name!r} no samples ({read.blank} without an answer, {read.overlong} above "
            f"seq_length={config.seq_length} with overlong={config.overlong}); raise seq_length or mend the file"
        )
    splits = {"train": read}
    if task.validation_path:
        validation_task = dataclasses.replace(task, path=task.validation_path)
        splits["validation"] = _read_split(validation_task, config, tokenizer, progress)
        train, validation = read.samples, splits["validation"].samples
    else:
        train, validation = split_off(read.samples, config.validation_samples, seed, name)
    fingerprints = {which: split.reading.fingerprint for which, split in splits.items()}
    return TaskDataset(
        name,
        task.weight,
        train,
        validation,
        overlong=sum(split.overlong for split in splits.values()),
        blank=sum(split.blank for split in splits.values()),
        skipped=sum(split.reading.skipped for split in splits.values()),
        skip_reasons=[reason for split in splits.values() for reason in split.reading.reasons],
        special_tokens=[line for split in splits.values() for line in _special_tokens_told(split.reading)],
        fingerprints=fingerprints | {"split": _digest(train, validation)},
    )


def _special_tokens_told(reading: Reading) -> list[str]:
    if not reading.special_tokens:
        return []
    counts = ", ".join(f"{token} {count:,}" for token, count in reading.special_tokens.most_common(3))
    return [
        f"special tokens inside the text: {reading.special_tokens.total():,} ({counts}), first at "
        f"{reading.first_special_token}; allow_special_tokens_in_data=false refuses them"
    ]


def _digest(*parts: Sequence[TokenizedExample]) -> str:
    """SHA-256 of which records of their files the parts hold, wherever the files lie."""
    numbers = [[sample.source.rsplit(":", 1)[-1] for sample in part] for part in parts]
    return hashlib.sha256(json.dumps(numbers).encode()).hexdigest()


def _read_split(task: TaskConfig, config: DataConfig, tokenizer: PreTrainedTokenizerBase, progress: Progress) -> _Split:
    reading = Reading(config.corrupt_data, config.allow_special_tokens_in_data)
    with progress.phase(f"reading {task.label}"):
        examples = load_examples(task, tokenizer, reading)
    answered = [example for example in examples if example.answer.strip()]
    encoded = [encode_example(example, tokenizer) for example in progress.over(answered, f"tokenising {task.label}")]
    fitted = [fit(sample, config.seq_length, config.overlong) for sample in encoded]
    return _Split(
        samples=[sample for sample in fitted if sample is not None],
        overlong=sum(len(sample.token_ids) > config.seq_length for sample in encoded),
        blank=len(examples) - len(answered),
        reading=reading,
    )
