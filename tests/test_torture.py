"""tools/torture.py in short: two kills, a signal, a sample of damaged bytes, each property once; and that it can tell.

For longer: ``python tools/torture.py --minutes 60``.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.fuzzing import PROPERTIES
from tools.torture import damage
from tools.torture.damage import Files, fuzz
from tools.torture.disturbances import Disturbed, kill_run, signal_run
from tools.torture.findings import Findings
from tools.torture.runs import LAYOUTS, TOKEN, Run, Site

EP_2 = LAYOUTS[0]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("torture"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("torture"), Findings(), seed=12)


@pytest.fixture
def findings() -> Findings:
    found = Findings()
    found.job = "this test"
    return found


def test_a_killed_run_ends_as_if_undisturbed(
    site: Site, findings: Findings, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rank while it saves, the agent while ranks begin."""
    kill_run(site, findings, seed=1, layout=EP_2, plan=[("rank", "save"), ("agent", "birth")])
    told = capsys.readouterr().err
    assert findings.line == "kills=2 torn=0 fuzzed=0 hangs=0 full_disk=0 signals=0 lost=0 wrong=0 orphans=0", told
    assert "as undisturbed" in told


def test_a_signalled_run_goes_on(site: Site, findings: Findings, capsys: pytest.CaptureFixture[str]) -> None:
    signal_run(site, findings, seed=3, layout=EP_2)
    told = capsys.readouterr().err
    assert not findings.has_faults, told
    assert "as undisturbed" in told


def test_damage_is_noticed(files: Files, findings: Findings, capsys: pytest.CaptureFixture[str]) -> None:
    files.findings = findings
    for _ in range(300):
        files.damage_one()
    assert not findings.has_faults, capsys.readouterr().err
    assert (findings.counts["torn"], files.flipped) == (300, 285)


def test_damage_that_nobody_notices_is_told(
    files: Files, findings: Findings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files.findings = findings
    monkeypatch.setattr("malora_dist.checkpoint.manifest._digest", lambda file: "")  # as if it never differed
    monkeypatch.setattr("malora_dist.checkpoint.manifest.read_manifest", lambda directory: {})
    for _ in range(40):
        files.damage_one()
    assert findings.counts["wrong"] > 10
    assert "flipped: it is not noticed; repeat: this test" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PROPERTIES)
def test_fuzzed_inputs_are_refused_or_read(
    name: str, findings: Findings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fuzz(findings, name, seed=12)
    assert not findings.has_faults, capsys.readouterr().err

    def raises(rng: random.Random, folder: Path) -> None:
        raise KeyError(rng.random(), folder.is_dir())

    monkeypatch.setitem(damage.PROPERTIES, name, raises)
    fuzz(findings, name, seed=12)
    assert findings.counts["wrong"] == 1
    assert f"{name}, random.Random(12): raises KeyError(" in capsys.readouterr().err


def test_other_weights_and_leftovers_are_told(
    site: Site, findings: Findings, capsys: pytest.CaptureFixture[str]
) -> None:
    site.expected(EP_2)
    disturbed = Disturbed(site, findings, "judged", EP_2, [], restarts=0)
    shutil.copytree(site.folder / "undisturbed-EP2" / "save", disturbed.run.save)
    disturbed.compare()
    assert not findings.has_faults, capsys.readouterr().err
    (disturbed.run.save / ".iter_0000003.partial").mkdir()
    key = next(iter(disturbed.expected))
    disturbed.expected = {**disturbed.expected, key: disturbed.expected[key] + 1e-7}
    disturbed.compare()
    told = capsys.readouterr().err
    assert "WRONG: left behind in save: ['.iter_0000003.partial']" in told
    assert f"WRONG: 1 of {len(disturbed.expected)} tensors differ, the first {key}" in told
    assert f"repeat: this test; kept: {disturbed.run.folder}" in told


@pytest.mark.parametrize(("floor", "went_back"), [(4, ""), (5, "iteration 5 was published")])
def test_a_start_behind_a_checkpoint_is_told(site: Site, floor: int, went_back: str) -> None:
    run = Run(site, EP_2, [], f"behind-{floor}", restarts=0)
    (run.folder / "log").write_text("layout  x\niteration  1/20 |\n")
    run.save.mkdir()
    (run.save / "latest_checkpointed_iteration.txt").write_text(f"{floor}\n")
    run.disturb()
    assert not run.went_back()
    with (run.folder / "log").open("a") as log:
        log.write("layout  x\ngoing on\niteration  5/20 |\n")
    assert run.went_back().startswith(went_back)
    assert bool(run.went_back()) == bool(went_back)


def test_processes_are_known_by_their_token(site: Site) -> None:
    run = Run(site, EP_2, [], "token", restarts=0)
    assert not run.processes()
    with subprocess.Popen(["sleep", "60"], env=os.environ | {TOKEN: run.token}) as process:
        assert [found.pid for found in run.processes()] == [process.pid]
        process.kill()
    assert not run.orphans()
