"""What a run that goes on from a checkpoint does differently from the one that wrote it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from malora_dist.checkpoint.start import Start
from malora_dist.config import Config
from malora_dist.config_file import load_config
from malora_dist.errors import ConfigError

#: Say where a run starts from and goes to, and differ by nature.
_OF_THE_START = {"load", "resume", "overwrite"}


def config_differences(start: Start, config: Config) -> list[str]:
    """The config keys whose values are not those of the checkpoint's run: ``lr: 0.001 -> 0.0005``."""
    file = start.directory / "config.yaml"
    if not file.is_file():
        return []  # an import has no run
    try:
        saved = _flat(load_config(file, may_include=False))
    except ConfigError as error:
        return [f"{file} cannot be compared: {error}"]
    now = _flat(config)
    absent = "(none)"
    return [
        f"{key}: {saved.get(key, absent)!r} -> {now.get(key, absent)!r}"
        for key in dict.fromkeys([*saved, *now])
        if saved.get(key, absent) != now.get(key, absent)
    ]


def check_data(start: Start, config: Config, data: Mapping[str, str], paths: Mapping[str, str]) -> list[str]:
    """Refuse data other than the checkpoint's, of which samples of validation may become training samples.

    Args:
        data: {``TASK/train``, ``TASK/validation`` or ``TASK/split``: fingerprint}, see :func:`data_fingerprints`.
        paths: {the first two of these: path}.

    Returns:
        what has changed, where `allow_changed_data` permits it.

    Raises:
        ConfigError: it does not.
    """
    saved = start.info.data
    if not saved:
        return []  # an import, or an earlier version wrote it
    changes = _data_changes(saved, data, paths)
    if changes and not config.allow_changed_data:
        causes = [text for text in config_differences(start, config) if _is_about_data(text)]
        because = f" (differs from its config: {'; '.join(causes)})" if causes else ""
        raise ConfigError(
            "allow_changed_data",
            False,
            f"{'; '.join(changes)} since {start.directory} was written{because}, so that samples of validation may "
            "become training samples",
            "give it back the data and the keys it had, or set allow_changed_data=true",
        )
    return changes


def _data_changes(saved: Mapping[str, str], now: Mapping[str, str], paths: Mapping[str, str]) -> list[str]:
    tasks_then, tasks_now = (_tasks(data) for data in (saved, now))
    if tasks_then != tasks_now:
        return [f"the tasks are no longer {', '.join(tasks_then)} but {', '.join(tasks_now)}"]
    changed = [key for key in dict.fromkeys([*saved, *now]) if saved.get(key) != now.get(key)]
    texts = {}
    for key in changed:
        task, _, part = key.rpartition("/")
        if part != "split":
            texts[task] = f"the content of {paths.get(key) or 'the validation file'} (task {task}) has changed"
        else:
            texts.setdefault(task, f"which samples of task {task} are trained on and which held out has changed")
    return list(texts.values())


def _tasks(data: Mapping[str, str]) -> Sequence[str]:
    return list(dict.fromkeys(key.rpartition("/")[0] for key in data))


def _is_about_data(difference: str) -> bool:
    return difference.startswith(("seed:", "data[", "validation_samples:", "overlong:", "seq_length:", "corrupt_data:"))


def _flat(config: Config) -> dict[str, Any]:
    """{key: value}, tasks as ``data[0].path``."""
    values = dataclasses.asdict(config)
    tasks = values.pop("data")
    flat = {key: value for key, value in values.items() if key not in _OF_THE_START}
    return flat | {f"data[{i}].{key}": value for i, task in enumerate(tasks) for key, value in task.items()}
