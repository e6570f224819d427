"""A config from a file and the command line: YAML, then ``key=value`` pairs that override it; and back to YAML."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from malora_dist.config import Config
from malora_dist.config_sections import TaskConfig
from malora_dist.errors import ConfigError, first_line
from malora_dist.files import is_regular_file

#: How a key of a task is written: data[0].weight.
_TASK_KEY = re.compile(r"data\[(?P<index>\d+)\]\.(?P<name>\w+)")
#: The start of an interpolation that is more than the name of another key: ${oc.env:HOME}, ${${save}}.
_RESOLVER = re.compile(r"(?<!\\)(?:\\\\)*\$\{(?![\w.\[\]]+\})")
#: Most files that include one another.
_MOST_INCLUDES = 10
#: {type of a field: (what its values are, an example)}.
_TYPES = {
    "int": ("a whole number", "8"),
    "float": ("a number", "0.01"),
    "int | None": ("a whole number", "8"),
    "float | None": ("a number", "16"),
    "bool": ("true or false", "true"),
    "str": ("a text", "'text'"),
    "list[str]": ("a list of names", "[q_proj,v_proj]"),
    "list[int]": ("a list of whole numbers", "[10,15]"),
    "list[TaskConfig]": ("a list of tasks", "[{path: FILE}]"),
}


#: Keys of earlier versions: {name: what to write instead}.
_RETIRED = {
    "rank_expansion": "an expert's rank is lora_rank itself: write lora_rank=round(rank_expansion * lora_rank) and "
    "shared_dim, beta only scales the start"
}


def load_config(path: str | Path | None, overrides: Sequence[str] = (), may_include: bool = True) -> Config:
    """Read a YAML file and apply ``key=value`` overrides; ``data[1].weight=2`` reaches into the tasks.

    Relative paths in the file and on the command line are taken as they are, from the working
    directory.

    Args:
        may_include: whether the file may lead to others; that of a checkpoint, which may come from anywhere, may not.

    Raises:
        ConfigError: no such file, not YAML, an unknown key, a value of the wrong type, or one that would be read
            from the environment, which could be a secret and would be saved with the run.
    """
    config = OmegaConf.structured(Config)
    for key, value in _read_yaml(Path(path), may_include).items() if path is not None else ():
        _assign(config, str(key), value)
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals:
            raise ConfigError("command line", item, "is not of the form key=value", "write for example lr=1e-3")
        _assign(config, key, _parse_value(key, text) if text else "")
    try:
        loaded = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:  # a ${...} that leads nowhere
        raise ConfigError(
            error.full_key or "--config", "${...}", first_line(error), "write the value itself"
        ) from error
    assert isinstance(loaded, Config)
    return loaded


def _read_yaml(file: Path, may_include: bool = True, includers: tuple[Path, ...] = ()) -> dict[Any, Any]:
    """The top level of a YAML file, on top of that of the file it may ``include``; ``${...}`` unresolved.

    Args:
        includers: the files whose ``include`` led here.
    """
    if not is_regular_file(file):
        raise ConfigError("--config", str(file), "is not a file", "name a YAML file, for example one of configs/")
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(file))
    except yaml.MarkedYAMLError as error:
        place = f"{file}:{error.problem_mark.line + 1}" if error.problem_mark else str(file)
        raise ConfigError("--config", place, f"is not valid YAML ({error.problem})", "mend the line") from error
    except (
        yaml.YAMLError,
        OmegaConfBaseException,
        ValueError,  # not a text
        OSError,
        RecursionError,  # brackets in brackets in brackets ...
    ) as error:
        rule = f"cannot be read as YAML ({first_line(error)})"
        raise ConfigError("--config", str(file), rule, "name a text file of `key: value` lines") from error
    if not isinstance(loaded, dict):
        raise ConfigError("--config", str(file), "holds a list", "write `key: value` lines")
    if "include" not in loaded:
        return loaded
    if not may_include:
        raise ConfigError("include", str(loaded["include"]), f"must not stand in {file}", "take it out")
    included = file.parent / str(loaded.pop("include"))
    if not is_regular_file(included):
        raise ConfigError("include", str(included), f"is not a file, but {file} names it", "write it relative to there")
    chain = (*includers, file.resolve())
    if included.resolve() in chain:
        raise ConfigError("include", str(included), "leads back to itself", f"take it out of {file}")
    if len(chain) > _MOST_INCLUDES:
        raise ConfigError("include", str(included), f"is included through {len(chain)} files", "join some of them")
    return _read_yaml(included, may_include, chain) | loaded


def _parse_value(key: str, text: str) -> Any:
    """The value of an override, read as YAML, ``${...}`` unresolved."""
    try:
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
    except (  # ValueError: a number of thousands of digits
        yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError
    ) as error:  # fmt: skip
        rule = f"is not valid YAML ({first_line(error)})"
        raise ConfigError(key, text, rule, "close brackets and quotes") from error
    assert isinstance(parsed, dict)
    return parsed["value"]


def _assign(config: DictConfig, key: str, value: Any) -> None:
    """Set one key; `data` task by task, so that an error names the key inside."""
    if key == "data" and isinstance(value, list) and all(isinstance(task, dict) for task in value):
        OmegaConf.update(config, key, [{} for _ in value])
        for i, task in enumerate(value):
            for name, inner in task.items():
                _assign(config, f"data[{i}].{name}", inner)
        return
    _check_interpolations(key, value)
    kind = str(_find_field(config, key, value).type)
    rule, example = _TYPES[kind]
    try:
        if (
            kind in ("list[str]", "list[int]")
            and isinstance(value, list)
            and any(isinstance(entry, list | dict) for entry in value)
        ):
            raise ValidationError("a list in a list")  # which omegaconf lets pass
        OmegaConf.update(config, key, value)
    except (OmegaConfBaseException, OverflowError, RecursionError) as error:  # OverflowError: no float is so large
        raise ConfigError(key, value, f"must be {rule}", f"write for example {key}={example}") from error


def _check_interpolations(key: str, value: Any) -> None:
    """Refuse ``${oc.env:NAME}`` and whatever else omegaconf would compute: ``${...}`` names another key."""
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            _check_interpolations(key, inner)
    elif isinstance(value, str) and _RESOLVER.search(value):
        rule = "${...} must hold the name of another key; what is read from the environment would be saved with the run"
        raise ConfigError(key, value, rule, f'write `{key}="$NAME"` on the command line')


def _find_field(config: DictConfig, key: str, value: Any) -> dataclasses.Field[Any]:
    """The field that a key names: of the config, or of one of its tasks."""
    match = _TASK_KEY.fullmatch(key)
    fields = {f.name: f for f in dataclasses.fields(TaskConfig if match else Config)}
    name = match["name"] if match else key
    if key in _RETIRED:
        raise ConfigError(key, value, "is no config key any more", _RETIRED[key])
    if name not in fields:
        close = difflib.get_close_matches(name, fields, n=1)
        cure = f"did you mean {close[0]}?" if close else "docs/config.md lists them all"
        raise ConfigError(key, value, "is not a config key", cure)
    if match and int(match["index"]) >= len(config.data):
        raise ConfigError(key, value, f"there are {len(config.data)} tasks, counted from 0", "add it to `data`")
    return fields[name]


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML."""
    OmegaConf.save(OmegaConf.structured(config), path)
