"""Which implementation is used and why: detection, megatron's Adam, the banner; and the check of versions.

The optional packages are not installed here. What stands for them are modules with the names that
the detection looks for; megatron is the real one.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from malora_dist.config import Config
from malora_dist.errors import BackendUnavailableError
from malora_dist.metrics.banner import stage_sizes
from malora_dist.parallel.backends import (
    TORCH_ADAM,
    TORCH_ATTENTION,
    Choice,
    adam_choice,
    attention_choice,
)
from malora_dist.parallel.versions import SUPPORTED, SUPPORTED_PYTHON, check_versions
from tests.conftest import ROOT
from tests.test_parity import overrides
from tests.workers import WorkerPool

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TE_ADAM = "transformer_engine.pytorch.optimizers.FusedAdam"
APEX_ADAM = "apex.optimizers.FusedAdam"
TE_ATTENTION = "megatron.core.extensions.transformer_engine.TEDotProductAttention"

Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Make dotted names importable: ``install("amp_C.multi_tensor_adam")``."""

    def install_names(*names: str) -> None:
        for name in names:
            *packages, attribute = name.split(".")
            for depth in range(1, len(packages) + 1):
                module = ".".join(packages[:depth])
                monkeypatch.setitem(sys.modules, module, sys.modules.get(module) or ModuleType(module))
            monkeypatch.setattr(sys.modules[".".join(packages)], attribute, object(), raising=False)

    packages = ("transformer_engine", "transformer_engine_torch", "apex", "amp_C")
    for module in [name for name in sys.modules if name.partition(".")[0] in packages]:
        monkeypatch.delitem(sys.modules, module)
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)  # not importable, whatever this machine has
    return install_names


APEX = (APEX_ADAM, "amp_C.multi_tensor_adam")
TE = (TE_ADAM, "transformer_engine_torch.multi_tensor_adam", "transformer_engine_torch.fused_attn_fwd")
NO_TE = f"{TE_ADAM} is not there (No module named 'transformer_engine.pytorch'; 'transformer_engine' is not a package)"
NO_APEX = f"{APEX_ADAM} is not there (No module named 'apex.optimizers'; 'apex' is not a package)"


@pytest.mark.parametrize(
    ("asked", "device", "installed", "chosen", "reason"),
    [
        ("auto", CPU, (), TORCH_ADAM, "auto: fused kernels need CUDA, this run is on cpu"),
        ("auto", CPU, (*TE, *APEX), TORCH_ADAM, "auto: fused kernels need CUDA, this run is on cpu"),
        ("auto", CUDA, (), TORCH_ADAM, f"auto: {NO_TE}; {NO_APEX}"),
        ("auto", CUDA, APEX, APEX_ADAM, f"auto: {NO_TE}"),
        ("auto", CUDA, (*TE, *APEX), TE_ADAM, "auto: usable here"),
        (
            "auto",
            CUDA,
            APEX[:1],
            TORCH_ADAM,
            f"auto: {NO_TE}; amp_C.multi_tensor_adam is not there (import of amp_C halted; None in sys.modules)",
        ),
        ("torch", CUDA, (*TE, *APEX), TORCH_ADAM, "asked for"),
        ("torch", CPU, (), TORCH_ADAM, "asked for"),
        ("apex", CUDA, (*TE, *APEX), APEX_ADAM, "asked for"),
        ("transformer_engine", CUDA, TE, TE_ADAM, "asked for"),
    ],
)
def test_adam(
    asked: str, device: torch.device, installed: tuple[str, ...], chosen: str, reason: str, install: Install
) -> None:
    install(*installed)
    assert adam_choice(Config(adam_implementation=asked), device) == Choice("Adam", chosen, reason)


def test_the_other_package_named_apex_is_not_taken_for_nvidia_s(install: Install) -> None:
    """PyPI's is a module `apex` without optimizers; an NVIDIA apex built without kernels lacks amp_C's function."""
    install("apex.Configurator")
    choice = adam_choice(Config(), CUDA)
    assert choice.chosen == TORCH_ADAM
    assert "apex.optimizers" in choice.reason
    install(APEX_ADAM, "amp_C.something_else")
    choice = adam_choice(Config(), CUDA)
    assert choice.chosen == TORCH_ADAM
    assert "amp_C.multi_tensor_adam is not there (" in choice.reason


@pytest.mark.parametrize(
    ("key", "asked", "device", "expected"),
    [
        (
            "adam_implementation",
            "apex",
            CPU,
            "adam_implementation='apex': fused kernels need CUDA, this run is on cpu; use adam_implementation=auto",
        ),
        ("adam_implementation", "apex", CUDA, f"adam_implementation='apex': {NO_APEX}; use adam_implementation=auto"),
        (
            "adam_implementation",
            "transformer_engine",
            CUDA,
            f"adam_implementation='transformer_engine': {NO_TE}; use adam_implementation=auto",
        ),
        (
            "attention_implementation",
            "transformer_engine",
            CPU,
            "attention_implementation='transformer_engine': fused kernels need CUDA, this run is on cpu; "
            "use attention_implementation=auto",
        ),
        (
            "attention_implementation",
            "transformer_engine",
            CUDA,
            "attention_implementation='transformer_engine': Transformer Engine holds all scores of all heads in "
            "float32, its fused kernels need bf16=true; use attention_implementation=auto",
        ),
    ],
)
def test_asked_for_and_not_usable(key: str, asked: str, device: torch.device, expected: str, install: Install) -> None:
    choose = adam_choice if key == "adam_implementation" else attention_choice
    with pytest.raises(BackendUnavailableError) as error:
        choose(Config(**{key: asked}), device)  # type: ignore[arg-type]
    assert str(error.value) == expected


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "adam_implementation=adamw",
            "adam_implementation='adamw': must be one of auto, torch, transformer_engine, apex; ",
        ),
        ("attention_implementation=flash", "attention_implementation='flash': must be one of auto, sdpa, transformer"),
        ("adam_implementation=apex", "adam_implementation='apex': fused kernels need CUDA, this run is on cpu; use "),
        (
            "attention_implementation=transformer_engine",
            "attention_implementation='transformer_engine': fused kernels ",
        ),
    ],
)
def test_a_run_refuses_what_it_cannot_use(
    override: str, expected: str, workers: WorkerPool, base_dir: Path, task_files: list[Path]
) -> None:
    arguments = overrides(base_dir, task_files, override, "train_iters=1", "eval_iters=0")
    [ended] = workers.run("jobs_errors:train_main", 1, arguments=arguments)
    assert (ended.code, ended.stdout) == (2, "")
    assert ended.stderr.startswith(f"error: {expected}")
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("settings", "device", "installed", "chosen", "reason"),
    [
        ({}, CPU, TE, TORCH_ATTENTION, "auto: fused kernels need CUDA, this run is on cpu"),
        ({"attention_implementation": "sdpa"}, CUDA, TE, TORCH_ATTENTION, "asked for"),
        ({"bf16": True}, CUDA, TE, TE_ATTENTION, "auto: usable here"),
        ({"bf16": True, "attention_implementation": "transformer_engine"}, CUDA, TE, TE_ATTENTION, "asked for"),
        ({"bf16": False}, CUDA, TE, TORCH_ATTENTION, "auto: Transformer Engine holds all scores of all heads in "),
        ({"bf16": True, "packing": True}, CUDA, TE, TORCH_ATTENTION, "auto: Transformer Engine's kernels are not "),
        ({"bf16": True}, CUDA, (), TORCH_ATTENTION, "auto: transformer_engine_torch.fused_attn_fwd is not there ("),
    ],
)
def test_attention(
    settings: dict[str, Any], device: torch.device, installed: tuple[str, ...], chosen: str, reason: str,
    install: Install,
) -> None:  # fmt: skip
    install(*installed)
    choice = attention_choice(Config(**settings), device)
    assert (choice.part, choice.chosen) == ("attention", chosen)
    assert choice.reason.startswith(reason)


def test_a_choice_loads_what_it_names() -> None:
    assert Choice("Adam", TORCH_ADAM, "").load() is torch.optim.AdamW
    assert Choice("attention", TORCH_ATTENTION, "").load() is torch.nn.functional.scaled_dot_product_attention


def test_megatron_uses_the_chosen_adam(workers: WorkerPool, base_dir: Path, task_files: list[Path]) -> None:
    """Not the one it took at import: with Transformer Engine importable, that would be a CUDA kernel on a CPU."""
    [seen] = workers.run("jobs_backends:make_optimizers", 1, overrides=overrides(base_dir, task_files))
    assert seen["torch chosen"] == {True}
    assert seen["flags"] == {"HAVE_APEX_OR_TE": False, "USING_TE_OPTIMIZER": False}
    assert seen["fused chosen"] == {True}


def test_banner(workers: WorkerPool, base_dir: Path, task_files: list[Path]) -> None:
    """Readable in 88 columns; every part has an entry with a reason; the counts are the model's."""
    [seen] = workers.run("jobs_backends:write_banners", 1, overrides=overrides(base_dir, task_files))
    text = seen["malora"]
    assert max(len(line) for line in text.splitlines()) <= 88
    entries = parse(text)
    assert list(entries) == [
        "base", "adapter", "trainable", "layout", "dispatch", "experts", "attention", "Adam", "torch", "memory",
    ]  # fmt: skip
    reason = "auto: fused kernels need CUDA, this run is on cpu"
    assert entries["attention"] == f"{TORCH_ATTENTION} ({reason})"
    assert entries["Adam"] == f"{TORCH_ADAM} ({reason})"
    assert entries["dispatch"] == "local (auto: all experts are on every rank)"
    assert entries["experts"] == "gated_block (auto: 4 experts at hand)"
    assert entries["trainable"].startswith(f"{seen['trainable']:,} parameters (")
    counts = re.findall(r"(\w+) ([\d,]+\d)", entries["trainable"].partition("): ")[2])
    assert [kind for kind, _ in counts] == ["router", "S", "P", "B"]
    assert sum(int(number.replace(",", "")) for _, number in counts) == seen["trainable"]
    assert re.search(r"A [\d,]+ \(frozen\), B [\d,]+$", parse(seen["asymmetric_lora"])["trainable"])
    assert parse(seen["asymmetric_lora"])["dispatch"] == "local (method=asymmetric_lora has one expert)"
    assert parse(seen["interleaved"])["stages"] == "of 2 layers, each in 2 chunks that take turns (interleaved)"


def parse(text: str) -> dict[str, str]:
    """{label: text} of a banner, wrapped lines joined."""
    lines = text.splitlines()
    assert lines[0] == lines[-1] == "-" * 88
    entries: dict[str, str] = {}
    for line in lines[1:-1]:
        label = line[:12].strip() or list(entries)[-1]
        entries[label] = f"{entries[label]} {line[12:]}" if label in entries else line[12:]
    return entries


@pytest.mark.parametrize(
    ("layers", "stages", "first", "last", "expected"),
    [
        (8, 4, 0, 0, [2, 2, 2, 2]),
        (7, 3, 1, 0, [1, 3, 3]),
        (10, 3, 0, 4, [3, 3, 4]),
        (6, 2, 2, 4, [2, 4]),
        (9, 4, 1, 2, [1, 3, 3, 2]),
        (5, 1, 0, 0, [5]),
    ],
)
def test_stage_sizes(layers: int, stages: int, first: int, last: int, expected: list[int]) -> None:
    assert stage_sizes(layers, stages, first, last) == expected


# --- versions


def test_the_supported_ranges_are_those_of_setup() -> None:
    call = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body[-1]
    assert isinstance(call, ast.Expr)
    assert isinstance(call.value, ast.Call)
    arguments = {keyword.arg: keyword.value for keyword in call.value.keywords}
    requirements = ast.literal_eval(arguments["install_requires"])
    assert {f"{package}{supported}" for package, supported in SUPPORTED.items()} <= set(requirements)
    assert ast.literal_eval(arguments["python_requires"]) == SUPPORTED_PYTHON


def test_supported_versions_pass() -> None:
    check_versions()  # what the tests run with
    for python, megatron in (("3.11.9", "0.16.1"), ("3.12.13", "0.19.2")):
        check_versions({"torch": "2.13.0+cpu", "megatron-core": megatron}.__getitem__, python)


@pytest.mark.parametrize(
    ("python", "torch_version", "megatron", "expected"),
    [
        ("3.13.1", "2.13.0", "0.16.1", "Python 3.13.1: must be >=3.11,<3.13; make an environment with a supported one"),
        ("3.11.9", "2.5.1+cu124", "0.16.1", "torch 2.5.1+cu124: must be >=2.10; pip install 'torch>=2.10'"),
        (
            "3.11.9",
            "2.13.0",
            "0.20.0rc1",
            "megatron-core 0.20.0rc1: must be >=0.16,<0.20; pip install 'megatron-core>=0.16,<0.20'",
        ),
        (
            "3.11.9",
            "2.13.0",
            None,
            "megatron-core is not installed: must be >=0.16,<0.20; pip install 'megatron-core>=0.16,<0.20'",
        ),
    ],
)
def test_versions_out_of_range(python: str, torch_version: str, megatron: str | None, expected: str) -> None:
    def installed(package: str) -> str:
        if package == "torch":
            return torch_version
        if megatron is None:
            raise PackageNotFoundError(package)
        return megatron

    with pytest.raises(BackendUnavailableError) as error:
        check_versions(installed, python)
    assert str(error.value) == expected


def test_a_run_checks_the_versions_before_it_imports_them(tmp_path: Path) -> None:
    """A megatron-core from the future, and importing torch or megatron would fail."""
    metadata = tmp_path / "megatron_core-0.21.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: megatron-core\nVersion: 0.21.0\n")
    for module in ("torch", "megatron"):
        (tmp_path / f"{module}.py").write_text("raise RuntimeError('imported')\n")
    done = subprocess.run(
        [sys.executable, "-m", "malora_dist.train", "lora_rnk=4"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    cure = "pip install 'megatron-core>=0.16,<0.20'"
    assert done.stderr == f"error: megatron-core 0.21.0: must be >=0.16,<0.20; {cure}\n"
    assert done.returncode == 2


def test_a_cpu_run_takes_no_cuda_kernels_for_the_gradient_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """megatron takes them where Transformer Engine or apex is installed, whatever the device."""
    from malora_dist.parallel.device import adapt_megatron

    adapt_megatron(CPU)
    from megatron.core.optimizer import clip_grads

    monkeypatch.setattr(clip_grads, "l2_norm_impl", "a CUDA kernel")
    adapt_megatron(CPU)
    assert clip_grads.l2_norm_impl is sys.modules["megatron.core.utils"].local_multi_tensor_l2_norm
