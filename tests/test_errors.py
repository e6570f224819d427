"""Bad input: one clear line on stderr and exit code 2, before any training and before anything is saved.

Every run goes through the real entry point. What fails before the layout is built runs in this
process, the rest in the pool of workers, and a few again as real processes. Expected lines stand
here as the user sees them; "..." is any text.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Protocol
from unittest.mock import patch

import pytest
import torch

from malora_dist.checkpoint.convert import import_hf
from malora_dist.parallel.compatibility import keeps_common_state_inside
from tests.conftest import write_llama
from tests.jobs_errors import Ended, check_refused
from tests.workers import WorkerPool

ROOT = Path(__file__).resolve().parents[1]
TRACKER = "latest_checkpointed_iteration.txt"


# --- data, backends, bases and checkpoints: a real run up to the first step


def change_json(file: Path, **fields: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.fixture(scope="module")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with three layers and one group of key-value heads."""
    directory = tmp_path_factory.mktemp("other")
    write_llama(directory / "llama", num_hidden_layers=3, num_key_value_heads=1)
    import_hf(directory / "llama", directory / "base")
    return directory / "base"


def run_arguments(base: Path, data: Path, save: Path, *more: str) -> list[str]:
    """A run of one step that works, and what is changed in it."""
    return [
        f"pretrained_checkpoint={base}", f"data=[{{path: {data}}}]", f"save={save}", "device=cpu", "seq_length=48",
        "global_batch_size=2", "train_iters=1", "eval_iters=0", "lora_rank=4", "num_lora_experts=4", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def adapter_dir(
    workers: WorkerPool, base_dir: Path, task_files: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A whole adapter checkpoint."""
    save = tmp_path_factory.mktemp("adapter") / "save"
    [ended] = workers.run("jobs_errors:train_main", 1, arguments=run_arguments(base_dir, task_files[0], save))
    assert (ended.code, ended.stderr) == (0, "")
    return save


class Refuse(Protocol):
    """Checks that a run on ``world_size`` ranks, with these changes, ends with the expected line."""

    def __call__(
        self, expected: str, *changes: str, base: Path | None = None, data: Path | None = None, world_size: int = 1
    ) -> None: ...


@pytest.fixture
def refuse(workers: WorkerPool, base_dir: Path, task_files: list[Path], tmp_path: Path) -> Refuse:
    def run(
        expected: str, *changes: str, base: Path | None = None, data: Path | None = None, world_size: int = 1
    ) -> None:
        save = tmp_path / "save"
        arguments = run_arguments(base or base_dir, data or task_files[0], save, *changes)
        for rank, ended in enumerate(workers.run("jobs_errors:train_main", world_size, arguments=arguments)):
            check_refused(ended, expected, save, rank)

    return run


def record(prompt: str, completion: str = "ba") -> str:
    return json.dumps({"prompt": prompt, "completion": completion})


@pytest.mark.parametrize(
    ("lines", "overrides", "expected"),
    [
        (None, [], "{file}: no such file; check the path, relative ones start at the working directory"),
        ([], [], "{file}: holds no records; name another file or remove the task"),
        (
            [record("ab:"), '{"prompt": ab:}'],
            [],
            "{file}:2: not valid JSON (Expecting value, column 12); a file is either one JSON object per line or ...",
        ),
        (
            [record("ab:"), '{"prompt": "ab:", "completion": "ba"', record("ab:")],
            [],
            "{file}:2: not valid JSON (Expecting ',' delimiter, column 37); a file is either ...",
        ),
        ([record("ab:"), "[1]"], [], "{file}:2: a record must be a JSON object, not [1]; mend or remove it"),
        (
            ['{"text": "ab"}'],
            [],
            "{file}:1: the columns text fit no format; rename them ..., or set ...",
        ),
        (
            [record("ab:"), '{"prompt": "a"}'],
            [],
            "{file}:2: no column 'completion' (found: prompt); add it or remove the record",
        ),
        (
            [record("ab:", " ")],
            [],
            "{file}: leaves task 'task' no samples (1 without an answer, ...); ... the file",
        ),
        (
            [record("ab:"), record(20 * "ab")],
            ["seq_length=32", "overlong=error"],
            "{file}:2: 43 tokens exceed seq_length=32; raise it, or set overlong to truncate or drop",
        ),
    ],
)
def test_data(lines: list[str] | None, overrides: list[str], expected: str, refuse: Refuse, tmp_path: Path) -> None:
    file = tmp_path / "task.jsonl"
    if lines is not None:
        file.write_text("".join(f"{line}\n" for line in lines))
    refuse(expected.format(file=file), *overrides, data=file)


def test_truncation_and_a_short_context_are_reported(workers: WorkerPool, base_dir: Path, tmp_path: Path) -> None:
    """Overlong samples are cut by default, and their number stands above the first step's line."""
    file = tmp_path / "task.jsonl"
    file.write_text("\n".join(record(n * "ab") for n in (1, 80, 80)))
    arguments = run_arguments(base_dir, file, tmp_path / "save", "seq_length=129")
    [ended] = workers.run("jobs_errors:train_main", 1, arguments=arguments)
    assert (ended.code, ended.stderr) == (0, "")
    assert re.search(r"task: 3 training .* 2 overlong.*\n(.*\n)*iteration 1/1", ended.stdout)
    assert "\nseq_length=129: the base knows 128 positions (max_position_embeddings)" in ended.stdout


def test_ranks_that_read_different_data_are_refused(refuse: Refuse, tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / f"task{rank}.jsonl").write_text(f"{record('ab')}\n" * 3 + f"{record('ab', 'ba'[: 2 - rank])}\n")
    expected = "...task...jsonl: ranks 0 and 1 have read different contents (task/train); give all machines the same..."
    refuse(expected, f"data=[{{name: task, path: {tmp_path}/task$RANK.jsonl}}]", world_size=2)


@pytest.mark.parametrize(
    ("job", "changes", "expected"),
    [
        ("train_main", ["loggers=[consol]"], "loggers='consol': must be one of console, ...; choose one of them"),
        (
            "train_main",
            ["loggers=[tensorboard]", "tensorboard_dir={file}/below"],
            "tensorboard_dir='...below': cannot be written (Not a directory); name another directory",
        ),
        (
            "train_with_a_logger_that_cannot_begin",
            ["loggers=[failing]"],
            "loggers='failing': does not answer; name another",
        ),
    ],
)
def test_what_the_reporting_rank_meets_is_an_error_of_all(
    job: str, changes: list[str], expected: str, workers: WorkerPool, base_dir: Path, task_files: list[Path]
) -> None:
    """With two stages it is rank 1 that reports."""
    arguments = run_arguments(base_dir, task_files[0], Path("nowhere"), "save=", "pipeline_model_parallel_size=2")
    arguments += [change.format(file=task_files[0]) for change in changes]
    for rank, ended in enumerate(workers.run(f"jobs_errors:{job}", 2, arguments=arguments)):
        check_refused(ended, expected, Path("nowhere"), rank)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("device=cuda", "device='cuda': torch sees no GPU on this machine; use device=cpu or device=auto"),
        (
            "dispatch=fastmoe",
            "dispatch='fastmoe': fmoe works on CUDA tensors only, not on cpu; use ...",
        ),
    ],
)
def test_backends(override: str, expected: str, refuse: Refuse) -> None:
    refuse(expected, override)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["tensor_model_parallel_size=2", "sequence_parallel=true"],
            "tensor_model_parallel_size=2: must divide the base's num_key_value_heads=1; lower it",
        ),
        (
            ["pipeline_model_parallel_size=2"],
            "pipeline_model_parallel_size=2: cannot share the base's num_hidden_layers=3 equally: 2 stages; choose ...",
        ),
    ],
)
def test_layouts_that_do_not_fit_the_base(
    overrides: list[str], expected: str, refuse: Refuse, other_base: Path
) -> None:
    """Every rank says so; torchrun stops the others while they wait for rank 0 to speak."""
    refuse(expected, *overrides, base=other_base, world_size=2)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (shutil.rmtree, "{base}: is not a directory; make it with `python tools/convert_hf.py import`"),
        (
            lambda base: (base / "malora_base.json").unlink(),
            "{base}: is not a converted base, malora_base.json is missing; make one with `python tools/...",
        ),
        (
            lambda base: (base / TRACKER).unlink(),
            "{base}: is half-written, latest_checkpointed_iteration.txt is missing; write or copy it again",
        ),
        (
            lambda base: (base / "iter_0000000" / "__1_0.distcp").unlink(),
            "{base}/iter_0000000: is half-written, __1_0.distcp is missing; write or copy it again",
        ),
        (
            lambda base: change_json(base / "hf" / "config.json", intermediate_size=64),
            "{base}/iter_0000000: does not fit the model (...); convert the model again",
        ),
    ],
)
def test_bases(damage: Callable[[Path], object], expected: str, refuse: Refuse, base_dir: Path, tmp_path: Path) -> None:
    """Of an earlier version, without a manifest; with one see test_checkpoints.py."""
    base = shutil.copytree(base_dir, tmp_path / "base")
    (base / "manifest.json").unlink()
    damage(base)
    refuse(expected.format(base=base), base=base)


def test_hugging_face_directory_in_place_of_a_base(refuse: Refuse, llama_dir: Path) -> None:
    refuse(f"{llama_dir}: is not a converted base, ...; make one with `python tools/convert_hf...", base=llama_dir)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (shutil.rmtree, "{load}: is not a directory; name a checkpoint's directory"),
        (
            lambda load: (load / "iter_0000001" / "adapter.json").unlink(),
            "{load}/iter_0000001: is not an adapter checkpoint or is half-written, adapter.json is missing; name ...",
        ),
        (
            lambda load: (load / "iter_0000001" / "adapter.json").write_text("{"),
            "{load}/iter_0000001/adapter.json: cannot be read (...); copy the checkpoint again",
        ),
        (
            lambda load: change_json(load / "iter_0000001" / "adapter.json", format_version=99),
            "{load}/iter_0000001/adapter.json: format_version=99, this version reads 1 to 3; use the ...",
        ),
        (
            lambda load: (load / "iter_0000001" / "__0_0.distcp").unlink(),
            "{load}/iter_0000001: is half-written, __0_0.distcp is missing; write or copy it again",
        ),
        (
            lambda load: (load / "iter_0000001" / "__0_0.distcp").write_bytes(b""),
            "{load}/iter_0000001/__0_0.distcp: is half-written, has 0 of ... bytes; write or copy it again",
        ),
        (
            lambda load: (load / "iter_0000001" / ".metadata").unlink(),
            "{load}/iter_0000001: is half-written, .metadata is missing; write or copy it again",
        ),
        (
            lambda load: (load / "iter_0000001" / "metadata.json").unlink(),
            "{load}/iter_0000001: is half-written, metadata.json is missing; write or copy it again",
        ),
        pytest.param(
            lambda load: (load / "iter_0000001" / "common.pt").unlink(),
            "{load}/iter_0000001: is half-written, common.pt is missing; write or copy it again",
            marks=pytest.mark.skipif(keeps_common_state_inside(), reason="this megatron-core writes no common.pt"),
        ),
    ],
)
def test_half_written_adapter_checkpoints(
    damage: Callable[[Path], object], expected: str, refuse: Refuse, adapter_dir: Path, tmp_path: Path
) -> None:
    """Of an earlier version, without a manifest; with one see test_checkpoints.py."""
    load = shutil.copytree(adapter_dir, tmp_path / "load")
    (load / "iter_0000001" / "manifest.json").unlink()
    change_json(load / "iter_0000001" / "adapter.json", format_version=2)
    damage(load)
    refuse(expected.format(load=load), f"load={load}", "train_iters=2")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("method=molora", "has method='malora', the config says 'molora'; set it to the checkpoint's"),
        ("lora_rank=8", "has lora_rank=4, the config says 8; set it to the checkpoint's"),
        ("num_lora_experts=8", "has num_lora_experts=4, the config says 8; set it to the checkpoint's"),
        ("shared_dim=12", "has shared_dim=32, the config says 12; set it to the checkpoint's"),
        ("target_modules=[q_proj]", "has target_modules=('q_proj', ...), the config says ('q_proj',); set it to ..."),
    ],
)
def test_adapters_of_another_kind(override: str, expected: str, refuse: Refuse, adapter_dir: Path) -> None:
    refuse(f"{adapter_dir}/iter_0000001: {expected}", f"load={adapter_dir}", "train_iters=2", override)


def test_adapter_of_another_base(refuse: Refuse, llama_dir: Path, other_base: Path, adapter_dir: Path) -> None:
    refuse(
        f"{adapter_dir}/iter_0000001: was trained on another base ({llama_dir}, fingerprint ...) than "
        "pretrained_checkpoint holds (..., fingerprint ...); name that base",
        f"load={adapter_dir}",
        base=other_base,
    )


# --- real processes


def run_process(*arguments: str) -> Ended:
    """A command of this Python, from the checkout; it has to end by itself."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def broken_data(tmp_path: Path) -> Path:
    file = tmp_path / "task.jsonl"
    file.write_text(f"{record('ab:')}\noops\n")
    return file


def test_process_with_an_unknown_key(tmp_path: Path) -> None:
    save = tmp_path / "save"
    ended = run_process("-m", "malora_dist.train", f"save={save}", "lora_rnk=4")
    check_refused(ended, "lora_rnk=4: is not a config key; did you mean lora_rank?", save)


def test_process_with_broken_data(broken_data: Path, base_dir: Path, tmp_path: Path) -> None:
    """Also what torch, megatron and transformers have to say at import does not reach stderr."""
    save = tmp_path / "save"
    ended = run_process("-m", "malora_dist.train", *run_arguments(base_dir, broken_data, save))
    check_refused(ended, f"{broken_data}:2: not valid JSON (...); a file is either one JSON object per line ...", save)


def test_torchrun_says_it_once(broken_data: Path, base_dir: Path, tmp_path: Path) -> None:
    """Among torchrun's own report there is one line of ours; torchrun ends with its own exit code."""
    save = tmp_path / "save"
    arguments = run_arguments(base_dir, broken_data, save, "expert_model_parallel_size=2")
    ended = run_process(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "malora_dist.train", *arguments
    )
    ours = [line for line in ended.stderr.splitlines() if re.match(r"(\[rank \d+\] )?error: ", line)]
    assert len(ours) == 1, ended.stderr
    assert re.search("exitcode *: 2", ended.stderr)
    check_refused(ended._replace(code=2, stderr=f"{ours[0]}\n"), f"{broken_data}:2: not valid JSON ...", save)
    assert ended.code == 1


def test_import_of_another_model(
    tmp_path: Path, llama_dir: Path, convert_tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = shutil.copytree(llama_dir, tmp_path / "hf"), tmp_path / "base"
    change_json(source / "config.json", model_type="gpt2")
    arguments = ["convert_hf.py", "import", "--hf-model", str(source), "--megatron-path", str(target)]
    with patch.object(sys, "argv", arguments), pytest.raises(SystemExit) as end:
        convert_tool.main()
    ended = Ended(end.value.code, *capsys.readouterr())
    check_refused(ended, f"{source}: config.json has model_type='gpt2', must be one of llama, mistral...", target)
