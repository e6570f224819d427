"""Paths that a user names: blank ones, those that are no files, those that must never be replaced."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import pytest

from malora_dist.checkpoint.base import staged_directory
from malora_dist.errors import CheckpointError, DataError
from malora_dist.files import check_replaceable, file_within, is_regular_file, read_file, read_json_object, resolved

ROOT = Path(__file__).resolve().parents[1]
#: {tool: each of its commands with one blank path, the blank as ""}.
BLANKS = {
    "convert_hf.py": [
        ["import", "--hf-model", "x", "--megatron-path", ""],
        ["import", "--hf-model", "", "--megatron-path", "x"],
        ["export", "--megatron-path", "x", "--hf-path", ""],
        ["export-adapter", "--megatron-path", "x", "--hf-path", ""],
        ["import-adapter", "--adapter", "x", "--megatron-path", ""],
        ["import-adapter", "--adapter", "x", "--megatron-path", "x", "--base", ""],
        ["roundtrip", "--hf-model", "x", "--megatron-path", " "],
    ],
    "evaluate.py": [["--hf-model", "x", "--data", ""], ["--hf-model", "x", "--data", "x", "--json", ""]],
    "budget.py": [["--hf-model", ""], ["--json", ""]],
    "make_quickstart.py": [["--out", ""], ["--out", "x", "--data", ""]],
    "paper/intra_domain.py": [["--out", ""]],
}


@pytest.mark.parametrize(
    ("tool", "arguments"), [(tool, arguments) for tool, many in BLANKS.items() for arguments in many]
)
def test_blank_paths_are_refused(
    tool: str,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [tool, *arguments])
    monkeypatch.setattr(sys, "path", [str((ROOT / "tools" / tool).parent), *sys.path])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "tools" / tool), run_name="__main__")
    assert ended.value.code == 2
    blank = next(argument for argument in arguments if not argument.strip())
    option = arguments[arguments.index(blank) - 1]
    message = f"{option}: {blank!r} is blank, perhaps an unset shell variable; name a path"
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def irregular(tmp_path: Path) -> list[Path]:
    """What has a file's name but is none, a FIFO among them, which would block whoever opened it."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "directory").mkdir()
    for name, target in {"loop": "loop", "a": "b", "b": "a", "device": "/dev/zero", "gone": "nothing"}.items():
        (tmp_path / name).symlink_to(target)
    names = ("fifo", "directory", "loop", "a", "b", "device", "gone", "nul\0", "x" * 5000, "half \ud800")
    return [tmp_path / name for name in names]


def test_irregular_files_are_refused_unopened(tmp_path: Path) -> None:
    for path in irregular(tmp_path):
        assert not is_regular_file(path)
        with pytest.raises(DataError, match="is missing or not a regular file; copy it"):
            read_file(path, DataError, "copy it")


@pytest.mark.parametrize(
    "content",
    [b"", b"[1]", b"{", b"\xff", b"[" * 100_000, b'{"a": ' * 100_000, b'{"a": ' + b"1" * 5000 + b"}", b"\0"],
    ids=lambda content: repr(content[:6]),
)
def test_what_is_no_json_object_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.json: is not (JSON \(.*\)|a JSON object); copy it$"):
        read_json_object(tmp_path / "x.json", CheckpointError, "copy it")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", ".", "", "nul\0", None, 3, ["x"]])
def test_an_index_cannot_lead_out_of_its_directory(name: object, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="must be a name in the same directory"):
        file_within(tmp_path, name, tmp_path / "index.json")


@pytest.mark.parametrize("path", ["", "  ", "nul\0", "loop/x"])
def test_paths_that_lead_nowhere(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match=r"is no path|cannot be followed"):
        resolved(path)


def test_some_places_are_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty as they are: the working directory, a home, what holds them, mount points."""
    home, work = tmp_path / "homes" / "home", tmp_path / "work" / "here"
    for directory in (home, work):
        directory.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    for target, reason in {
        Path(): "the working directory",
        work.parent: "the working directory",
        home: "a home directory",
        home.parent: "a home directory",
        Path("/"): "mount point",
        Path("/proc"): "mount point",
    }.items():
        with pytest.raises(CheckpointError, match=reason), staged_directory(target):
            pytest.fail("the block must not run")
    check_replaceable(tmp_path / "new", ())
    assert work.is_dir()
    assert home.is_dir()


def test_what_appeared_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "target"

    def write() -> None:
        with staged_directory(target):
            target.mkdir()
            (target / "notes.txt").write_text("mine")

    with pytest.raises(CheckpointError, match=r"notes\.txt is there"):
        write()
    assert [path.name for path in tmp_path.rglob("*")] == ["target", "notes.txt"]


def test_an_earlier_result_is_replaced(tmp_path: Path) -> None:
    for content in ("first", "second"):
        with staged_directory(tmp_path / "target", {"result"}) as staging:
            (staging / "result").write_text(content)
    assert (tmp_path / "target" / "result").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
