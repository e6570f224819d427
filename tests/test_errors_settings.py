"""Settings that cannot work: one clear line on stderr and exit code 2, with nothing imported or read for them.

Through the real entry point, in this process. Expected lines stand here as the user sees them; "..." is any text.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from malora_dist.parallel import topology
from tests.jobs_errors import check_refused, train_main

ROOT = Path(__file__).resolve().parents[1]
TRACKER = "latest_checkpointed_iteration.txt"


@pytest.fixture
def before_layout(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Building the layout fails the test: the error has to come before."""

    def initialize(*_: object) -> None:
        pytest.fail("the run went on to build its layout")

    monkeypatch.setattr(topology, "initialize", initialize)
    return monkeypatch


@pytest.mark.parametrize(
    ("world_size", "overrides", "expected"),
    [
        (1, ["lora_rnk=4"], "lora_rnk=4: is not a config key; did you mean lora_rank?"),
        (
            1,
            ["rank_expansion=1.25"],
            "rank_expansion=1.25: is no config key any more; an expert's rank is lora_rank itself: write "
            "lora_rank=round(rank_expansion * lora_rank) and shared_dim, beta only scales the start",
        ),
        (1, ["sparkle=4"], "sparkle=4: is not a config key; docs/config.md lists them all"),
        (
            1,
            ["data=[{path: a.jsonl}, {pth: b.jsonl}]"],
            "data[1].pth='b.jsonl': is not a config key; did you mean path?",
        ),
        (1, ["data[1].wieght=2"], "data[1].wieght=2: is not a config key; did you mean weight?"),
        (1, ["data[2].weight=2"], "data[2].weight=2: there are 2 tasks, counted from 0; add it to `data`"),
        (1, ["lr"], "command line='lr': is not of the form key=value; write for example lr=1e-3"),
        (1, ["lr=fast"], "lr='fast': must be a number; write for example lr=0.01"),
        (1, ["train_iters=1.5"], "train_iters=1.5: must be a whole number; write for example train_iters=8"),
        (1, ["bf16=perhaps"], "bf16='perhaps': must be true or false; write for example bf16=true"),
        (1, ["save=[a]"], "save=['a']: must be a text; write for example save='text'"),
        (
            1,
            ["data[1].weight=heavy"],
            "data[1].weight='heavy': must be a number; write for example data[1].weight=...",
        ),
        (1, ["target_modules=q_proj"], "target_modules='q_proj': must be a list of names; write ...[q_proj,v_proj]"),
        (1, ["data=a.jsonl"], "data='a.jsonl': must be a list of tasks; write for example data=[{path: FILE}]"),
        (1, ["data=[{path:a.jsonl"], "data='[{path:a.jsonl': is not valid YAML (...); close brackets and quotes"),
        (1, ["lr=${min_rate}"], "lr='${...}': Interpolation key 'min_rate' not found; write the value itself"),
        (
            1,
            ["target_modules=[q_prj]"],
            "target_modules='q_prj': must be one of q_proj, ..., linear_qkv, ...; choose one of them",
        ),
        (1, ["profile_steps=[a]"], "profile_steps=['a']: must be a list of whole numbers; write ...[10,15]"),
        (1, ["profile_steps=[9,3]"], "profile_steps=[9, 3]: must be two steps, the first one and the last one; ..."),
        (1, ["profile_steps=[9,9]", "train_iters=8"], "profile_steps=[9, 9]: begins after train_iters=8; choose ..."),
        (1, ["profile_steps=[0,3]"], "profile_steps=0: must be at least 1; write for example [10,15]"),
        (
            1,
            ["profile_steps=[1,3]", "save="],
            "profile_steps=[1, 3]: has no effect without save or tensorboard_dir; set save=DIR",
        ),
        (1, ["topk=9"], "topk=9: must not exceed num_lora_experts=8; lower topk or add experts"),
        (1, ["data[0].format=xml"], "data[0].format='xml': must be one of auto, alpaca, ...; choose one of them"),
        (
            1,
            ["dispatch=magic"],
            "dispatch='magic': must be one of auto, all_to_all, fastmoe, gather_experts, local; choose one of them",
        ),
        (1, ["device=tpu"], "device='tpu': must be one of auto, cpu, cuda; choose one of them"),
        (
            1,
            ["pretrained_checkpoint=''"],
            "pretrained_checkpoint='': is required; make one with `python tools/...",
        ),
        (1, ["pretrained_checkpoint=' '"], "pretrained_checkpoint=' ': is required; make one with `python tools/..."),
        (1, ["data[1].path=' '"], "data[1].path=' ': is required; name a data file or a hub data set"),
        (1, ["data[1].weight=.inf"], "data[1].weight=inf: must be a finite number; remove the task to leave it out"),
        (1, ["data[1].weight=.nan"], "data[1].weight=nan: must be a finite number; remove the task to leave it out"),
        (1, ["data[1].weight=0"], "data[1].weight=0.0: must be above 0; remove the task to leave it out"),
        (1, ["lr=0"], "lr=0.0: must be above 0; 3e-4 is a usual value"),
        (1, ["lr=.inf"], "lr=inf: must be a finite number; 3e-4 is a usual value"),
        (1, [f"lr={'9' * 400}"], "lr=999...: must be a number; write for example lr=0.01"),
        (1, ["min_lr=1", "lr=0.5"], "min_lr=1.0: must be at most lr=0.5; lower it"),
        (1, ["adam_beta1=1"], "adam_beta1=1.0: must be in [0, 1); 0.9 is the usual value"),
        (1, ["adam_beta2=-0.1"], "adam_beta2=-0.1: must be in [0, 1); 0.999 is the usual value"),
        (1, ["adam_eps=0"], "adam_eps=0.0: must be above 0; 1e-8 is the usual value"),
        (1, ["weight_decay=-1"], "weight_decay=-1.0: must be at least 0; set 0 to switch it off"),
        (1, ["clip_grad=nan"], "clip_grad=nan: must be a finite number; set 0 to switch it off"),
        (1, ["seed=-1"], "seed=-1: must be at least 0; 1234 is as good as any"),
        (1, ["seed=2147483648"], "seed=2147483648: must be below 2147483648; lower it"),
        (1, [f"seed={'9' * 20}"], "seed=99999999999999999999: must be below 2147483648; lower it"),
        (
            1,
            [f"seed={'9' * 5000}"],
            "seed='999...': is not valid YAML (Exceeds the limit ...); close ...",
        ),
        (1, ["distributed_timeout_minutes=0"], "distributed_timeout_minutes=0.0: must be above 0; 10 is a usual value"),
        (1, ["data=[]"], "data=[]: is required; add at least one task: `data: [{path: FILE}]`"),
        (1, ["lr_warmup_iters=5", "train_iters=5"], "lr_warmup_iters=5: must be below train_iters=5; lower it"),
        (
            1,
            ["early_stopping_metric=loss"],
            "early_stopping_metric='loss': must be one of lm loss validation, accuracy validation, or one of them with "
            "/TASK; choose one of them",
        ),
        (
            1,
            ["early_stopping_metric=accuracy validation/c", "data[1].validation_path=d.jsonl", "validation_samples=0"],
            "early_stopping_metric='accuracy validation/c': 'c' is no task with a validation split; these are: b; ...",
        ),
        (
            1,
            ["early_stopping_patience=1", "validation_samples=0"],
            "early_stopping_patience=1: needs a validation split; raise validation_samples or set a task's ...",
        ),
        (1, ["early_stopping_patience=1", "eval_iters=0"], "early_stopping_patience=1: needs evaluations; set ..."),
        (1, [f"save={__file__}"], f"save={__file__!r}: is a file, must be a directory; name another"),
        (1, ["data[1].name=a"], "data[1].name='a': is already used by another task; give each task its own name"),
        (
            3,
            ["tensor_model_parallel_size=2"],
            "tensor_model_parallel_size=2: times pipeline_model_parallel_size=1 must divide the world size 3; "
            "start a multiple of 2 processes or lower one of the two",
        ),
        (
            6,
            ["tensor_model_parallel_size=2", "pipeline_model_parallel_size=2"],
            "tensor_model_parallel_size=2: times pipeline_model_parallel_size=2 must divide the world size 6; ...",
        ),
        (
            4,
            ["expert_model_parallel_size=4", "tensor_model_parallel_size=2", "sequence_parallel=true"],
            "expert_model_parallel_size=4: must divide the data-parallel size 2 (world size 4 / TP 2 / PP 1); "
            "start 8 processes or a multiple, or lower it",
        ),
        (
            4,
            ["num_lora_experts=6", "expert_model_parallel_size=4"],
            "num_lora_experts=6: must be divisible by expert_model_parallel_size=4; change one of the two",
        ),
        (
            2,
            ["method=lora", "expert_model_parallel_size=2"],
            "expert_model_parallel_size=2: method=lora has one expert and cannot be sharded; set it to 1 ...",
        ),
        (
            2,
            ["tensor_model_parallel_size=2"],
            "sequence_parallel=False: must be true with tensor_model_parallel_size=2, ...; set sequence_parallel=true",
        ),
        (
            2,
            ["dispatch=local", "expert_model_parallel_size=2"],
            "dispatch='local': keeps tokens on their rank, but expert_model_parallel_size=2; use dispatch=auto",
        ),
        (2, ["global_batch_size=7"], "global_batch_size=7: must be a multiple of ...; a multiple of 2 works"),
    ],
)
def test_settings(
    world_size: int, overrides: list[str], expected: str, tmp_path: Path, before_layout: pytest.MonkeyPatch
) -> None:
    before_layout.setenv("WORLD_SIZE", str(world_size))
    save = tmp_path / "save"
    valid = ["pretrained_checkpoint=base", "data=[{path: a.jsonl}, {path: b.jsonl}]", f"save={save}"]
    check_refused(train_main([*valid, *overrides]), expected, save)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "--config='{file}': is not a file; name a YAML file, for example one of configs/"),
        (
            b"lr: 1e-3\ntopk: [1\n",
            "--config='{file}:3': is not valid YAML (... expected ',' or ']'); mend the line",
        ),
        (b"lr: 1e-3\nlr: 1e-4\n", "--config='{file}:2': is not valid YAML (found duplicate key lr); mend the line"),
        (b"- lr: 1e-3\n", "--config='{file}': holds a list; write `key: value` lines"),
        (b"\xff\xfe\x00", "--config='{file}': cannot be read as YAML (...); name a text file of `key: value` lines"),
        (b"data:\n  - {path: a.jsonl, weight: heavy}\n", "data[0].weight='heavy': must be a number; write ..."),
        (b"lora_rnk: 4\n", "lora_rnk=4: is not a config key; did you mean lora_rank?"),
    ],
)
def test_config_file(content: bytes | None, expected: str, tmp_path: Path, before_layout: pytest.MonkeyPatch) -> None:
    file, save = tmp_path / "run.yaml", tmp_path / "save"
    if content is not None:
        file.write_bytes(content)
    check_refused(train_main(["--config", str(file), f"save={save}"]), expected.format(file=file), save)
