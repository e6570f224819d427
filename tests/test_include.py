"""``include`` in a config file: the included file is read first, the including one has the last word."""

from __future__ import annotations

from pathlib import Path

import pytest

from malora_dist.config_file import load_config
from malora_dist.errors import ConfigError


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


def test_the_including_file_and_the_command_line_win(tmp_path: Path) -> None:
    write(tmp_path / "all.yaml", "lr: 1e-3\ntopk: 1\nseed: 5\n")
    write(tmp_path / "task.yaml", "include: all.yaml\ntopk: 3\nseed: 6\n")
    run = write(tmp_path / "runs" / "mine.yaml", "seed: 7\ninclude: ../task.yaml\n")
    config = load_config(run, ["seed=8"])
    assert (config.lr, config.topk, config.seed) == (1e-3, 3, 8)


def test_a_list_is_replaced_as_a_whole(tmp_path: Path) -> None:
    write(tmp_path / "all.yaml", "data: [{path: a.jsonl}, {path: b.jsonl, weight: 2}]\n")
    run = write(tmp_path / "run.yaml", "include: all.yaml\ndata: [{path: c.jsonl}]\n")
    assert [(task.path, task.weight) for task in load_config(run).data] == [("c.jsonl", 1.0)]


def test_an_include_that_is_not_there(tmp_path: Path) -> None:
    run = write(tmp_path / "run.yaml", "include: all.yaml\n")
    with pytest.raises(ConfigError) as error:
        load_config(run)
    expected = f"include={str(tmp_path / 'all.yaml')!r}: is not a file, but {run} names it; write it relative to there"
    assert str(error.value) == expected


def test_a_circle(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "include: b.yaml\n")
    run = write(tmp_path / "b.yaml", "include: a.yaml\n")
    with pytest.raises(ConfigError, match=r"include='.*b.yaml': leads back to itself; take it out of .*a.yaml"):
        load_config(run)


def test_a_wrong_key_of_the_included_file_is_named(tmp_path: Path) -> None:
    write(tmp_path / "all.yaml", "lora_rnk: 4\n")
    with pytest.raises(ConfigError, match="lora_rnk=4: is not a config key"):
        load_config(write(tmp_path / "run.yaml", "include: all.yaml\n"))


def test_a_checkpoints_config_leads_nowhere_else(tmp_path: Path) -> None:
    """A crafted one could make a run read any file of its machine."""
    run = write(tmp_path / "config.yaml", f"include: {tmp_path / 'secret.yaml'}\n")
    write(tmp_path / "secret.yaml", "lr: 1.0\n")
    assert load_config(run).lr == 1.0
    with pytest.raises(ConfigError, match=r"include='.*secret.yaml': must not stand in .*config.yaml; take it out"):
        load_config(run, may_include=False)
