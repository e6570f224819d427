"""Config files and overrides that are no configs: one line each, and nothing of the environment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from malora_dist.config import Config
from malora_dist.config_file import load_config, save_config
from malora_dist.errors import ConfigError

BASE = "pretrained_checkpoint: x\ndata: [{path: f.jsonl}]\n"
BOMB = "a: &a [1, 1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1 or ''}, *a{i - 1 or ''}]\n" for i in range(1, 40))


def load(folder: Path, text: str, *overrides: str) -> Config:
    (folder / "c.yaml").write_text(text)
    config = load_config(folder / "c.yaml", overrides)
    config.validate(1)
    return config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 5000, "is not valid YAML"),
        ("a: " + "[" * 900 + "]" * 900, "cannot be read as YAML (maximum recursion depth"),
        (BOMB, "is not valid YAML"),
        ("a: &a [*a]", "is not valid YAML"),
        (BASE + "save: !!python/object/apply:os.system [true]", "is not valid YAML (could not determine a constructor"),
        (BASE + "seed: 0x" + "f" * 9000, "seed=a int too long to be shown: must be below 2147483648"),
        (BASE + 'save: "a\\0b"', r"save='a\x00b': holds what neither a file name nor UTF-8 can hold"),
        (BASE + "save: '  '", "save='  ': is blank"),
        (BASE + "data: [{path: '  '}]", "is not valid YAML"),
        ("pretrained_checkpoint: x\ndata: [{path: '  '}]", "data[0].path='  ': is required"),
        (BASE + "recompute_modules: [[]]", "recompute_modules=[[]]: must be a list of names"),
        ("include: " + "x" * 5000, "is not a file, but"),
        ("include: /dev/zero", "is not a file, but"),
        ("include: fifo", "is not a file, but"),
        ("include: c.yaml", "leads back to itself"),
        ("include: i0.yaml", "is included through 11 files; join some of them"),
    ],
    ids=lambda value: value[:30],
)
def test_configs_that_are_none(text: str, message: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for i in range(20):
        (tmp_path / f"i{i}.yaml").write_text(f"include: i{i + 1}.yaml")
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text)
    assert message in str(error.value)
    assert len(str(error.value)) < 1000 or "include" in text


@pytest.mark.parametrize(
    "value", ["${oc.env:SECRET}", "${oc.env:NONE,x}", "${oc.${load}:SECRET}", "\\\\\\\\${oc.env:SECRET}", "${${save}}"]
)
@pytest.mark.parametrize("key", ["save", "data[0].path"])
def test_nothing_comes_from_the_environment(
    value: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or it would be in the saved config."""
    monkeypatch.setenv("SECRET", "hidden")
    in_file = f"data: [{{path: f, name: '{value}'}}]\n" if "data" in key else f"{BASE}save: '{value}'\n"
    for text, overrides in ((in_file, ()), (BASE, (f"{key}={value}",))):
        with pytest.raises(ConfigError) as error:
            load(tmp_path, text, *overrides)
        assert "hidden" not in str(error.value)


def test_references_to_other_keys(tmp_path: Path) -> None:
    config = load(tmp_path, BASE + "save: runs/${data[0].path}/${method}\nload: '\\${save}'\n")
    assert (config.save, config.load) == ("runs/f.jsonl/malora", "${save}")
    save_config(config, tmp_path / "saved.yaml")
    assert "runs/f.jsonl/malora" in (tmp_path / "saved.yaml").read_text()
