"""tools/paper/: what its tables are made of, and every script from its options to its files."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

from malora_dist.data.tokenization import TokenizedExample
from malora_dist.errors import ConfigError, DataError
from tests.workers import WorkerPool

ROOT = Path(__file__).resolve().parents[1]
PAPER = ROOT / "tools" / "paper"
SCRIPTS = sorted(file for file in PAPER.glob("*.py") if "__main__" in file.read_text(encoding="utf-8"))
MODULES = (
    "bootstrap", "comparison", "experiment", "latency", "parameters", "real_tasks", "scales", "study", "subspaces",
    "sweep", "tiny_tasks",
)  # fmt: skip


@pytest.fixture(scope="module")
def paper() -> Iterator[Any]:
    """The modules of the folder; its scripts import each other from there."""
    sys.path.insert(0, str(PAPER))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    sys.path.remove(str(PAPER))


# ---- bootstrap.py


def coverage(paper: Any, seed_effect: float, question_effect: float, seeds: int) -> float:
    """How often the interval of a mean of normal data holds the true one."""
    rng, truth, questions = np.random.default_rng(1), 0.3, 60
    draws = paper.bootstrap.Draws(seeds, {"test": questions})
    held = 0
    for _ in range(400):
        table = truth + seed_effect * rng.normal(size=(seeds, 1)) + question_effect * rng.normal(size=(1, questions))
        interval = draws.interval({"test": table}, paper.bootstrap.average)
        held += interval.low <= truth <= interval.high
    return held / 400


def test_intervals_hold_the_truth_as_often_as_they_say(paper: Any) -> None:
    """0.95 of questions. Of eight seeds a little less, and 0.89 if as many were drawn as there are."""
    assert 0.91 < coverage(paper, seed_effect=0.0, question_effect=1.0, seeds=8) < 0.98
    assert 0.91 < coverage(paper, seed_effect=1.0, question_effect=0.0, seeds=8) < 0.98


def test_pairing_takes_out_what_both_sides_share(paper: Any) -> None:
    rng = np.random.default_rng(2)
    shared = rng.normal(size=(8, 1)) + rng.normal(size=(1, 60))
    a, b = ({"test": shared + mean + 0.01 * rng.normal(size=shared.shape)} for mean in (0.1, 0.0))
    draws = paper.bootstrap.draws_for(a)
    paired = draws.interval(paper.bootstrap.difference(a, b), paper.bootstrap.average)
    alone = draws.interval(a, paper.bootstrap.average)
    assert paired.low < 0.1 < paired.high
    assert paired.high - paired.low < 0.02 < 0.3 < alone.high - alone.low
    assert paired.excludes_zero
    assert paper.bootstrap.draws_for(a).interval(a, paper.bootstrap.average) == alone, "other draws every time"


def test_only_the_same_questions_are_paired(paper: Any) -> None:
    with pytest.raises(ValueError, match="same tests, seeds and questions"):
        paper.bootstrap.difference({"test": np.zeros((2, 3))}, {"test": np.zeros((2, 4))})


def test_an_interval_over_seeds_is_of_their_mean(paper: Any) -> None:
    interval = paper.bootstrap.over_seeds([1.0, 2.0, 6.0])
    assert interval.value == pytest.approx(3.0)
    assert 1.0 <= interval.low < 3.0 < interval.high <= 6.0


# ---- comparison.py


def result(seed: int, **tests: str) -> dict[str, Any]:
    """Of a run; a question's loss is 1 where it is right and 3 elsewhere."""
    scores = {
        test: {"right": right, "losses": [1.0 if one == "1" else 3.0 for one in right], "questions": len(right)}
        for test, right in tests.items()
    }
    return {"seed": seed, "tests": scores}


def test_merged_single_tasks_have_all_tests_of_their_seed(paper: Any) -> None:
    of_x, of_y = ([result(seed, **{task: right}) for seed in (1, 2)] for task, right in (("x", "10"), ("y", "01")))
    merged = paper.comparison.merged([of_x, of_y])
    assert [one["seed"] for one in merged] == [1, 2]
    assert [one["tests"] for one in merged] == [of_x[i]["tests"] | of_y[i]["tests"] for i in (0, 1)]


def test_seesaw_is_the_change_against_a_lora_of_the_task_alone(paper: Any) -> None:
    """x: 2 of 4 to 3 of 4; y: 4 of 4 to 2 of 4."""
    single = [result(seed, x="1100", y="1111") for seed in (1, 2)]
    mixed = {"LoRA": [result(seed, x="1110", y="1100") for seed in (1, 2)]}
    mean, worst = paper.comparison.seesaw(mixed, single)["LoRA"]
    assert (mean.value, worst.value) == pytest.approx((-0.125, -0.5))
    mean, worst = paper.comparison.seesaw(mixed, single, paper.comparison.losses)["LoRA"]
    assert (mean.value, worst.value) == pytest.approx((-0.25, -1.0)), "more loss is worse"


def test_the_worst_test_may_be_another_in_each_cell(paper: Any) -> None:
    results = {
        "MALoRA": [result(seed, x="1110", y="1111") for seed in (1, 2)],
        "LoRA": [result(seed, x="1111", y="1000") for seed in (1, 2)],
    }
    (interval,) = paper.comparison.worst_test(results, "MALoRA").values()
    assert interval.value == pytest.approx(0.75 - 0.25)
    assert paper.comparison.compare(results, "MALoRA")["LoRA"].value == pytest.approx((0.75 + 1) / 2 - (1 + 0.25) / 2)


# ---- study.py, experiment.py


def tuned(paper: Any, *losses: float) -> Any:
    """Chosen among 1, 2, 3, ..., each with two tuning seeds of these validation losses on average."""
    return paper.study.choose([
        {"lr": float(lr), "validation": {"x": loss - by, "y": loss + 3 * by}}
        for lr, loss in enumerate(losses, start=1)
        for by in (0.5, -0.5)
    ])  # fmt: skip


def test_the_lowest_validation_loss_decides_the_learning_rate(paper: Any) -> None:
    found = tuned(paper, 4.0, 2.0, 3.0)
    assert (found.lr, found.losses, found.at_edge) == (2.0, {1.0: 4.0, 2.0: 2.0, 3.0: 3.0}, False)


def test_a_rate_at_the_edge_of_the_grid_is_said(paper: Any) -> None:
    assert tuned(paper, 2.0, 3.0, 4.0).at_edge
    assert tuned(paper, 4.0, 3.0, 2.0).at_edge
    assert not tuned(paper, 2.0, 3.0).at_edge, "a grid of two has nothing but edges"


def test_what_diverged_is_not_chosen(paper: Any) -> None:
    assert tuned(paper, 3.0, 2.0, math.nan).lr == 2.0
    assert tuned(paper, math.nan, math.inf, 5.0).lr == 3.0
    assert tuned(paper, math.nan, math.nan, math.nan).lr == 1.0


@pytest.fixture(scope="module")
def domain(paper: Any, base_dir: Path, task_files: list[Path]) -> Any:
    """Two tasks of the tiny Llama's; each is validated on the other's file, and tested on its own."""
    tasks = tuple(
        paper.experiment.Task(file.stem, file, other, {file.stem: file}, "greedy")
        for file, other in zip(task_files, reversed(task_files), strict=True)
    )
    keys = {"seq_length": 64, "micro_batch_size": 4, "global_batch_size": 4, "train_iters": 2, "validation_samples": 0}
    return paper.experiment.Domain("inter_domain", base_dir, tasks, keys).with_digest()


@pytest.fixture
def a_run(paper: Any, domain: Any) -> Callable[..., Any]:
    """Runs of LoRA, of small differences."""

    def run(lr: float = 1e-3, seed: int = 1, name: str = "LoRA", of: Any = domain, keeps: bool = False, **keys: Any):
        cell = paper.experiment.Cell(name, {"method": "lora", "lora_rank": 2, **keys})
        return paper.experiment.Run(of, cell, lr, seed, keeps)

    return run


def test_equal_runs_have_one_identity(paper: Any, domain: Any, a_run: Any, tmp_path: Path) -> None:
    identity = a_run().identity
    assert a_run(name="another").identity == identity
    assert a_run(keeps=True).identity == identity
    file = tmp_path / "other.jsonl"
    file.write_text(domain.tasks[0].train.read_text() + json.dumps({"prompt": "?", "completion": "!"}) + "\n")
    other_data = (dataclasses.replace(domain.tasks[0], train=file), *domain.tasks[1:])
    others = [
        a_run(lr=2e-3),
        a_run(seed=2),
        a_run(lora_rank=3),
        a_run(of=dataclasses.replace(domain, keys={**domain.keys, "train_iters": 3})),
        a_run(of=dataclasses.replace(domain, tasks=other_data).with_digest()),
        a_run(of=domain.only(domain.tasks[0].name)),
        a_run(of=domain.only(domain.tasks[1].name)),
    ]
    assert len({identity, *(run.identity for run in others)}) == 1 + len(others)


# ---- the tasks


def test_drawn_tasks_have_no_sample_twice(paper: Any) -> None:
    counts = {"validation": 20, "test": 30, "train": 200}
    for skills in (paper.tiny_tasks.INTER_DOMAIN, paper.tiny_tasks.INTRA_DOMAIN):
        for skill in skills.values():
            splits = paper.tiny_tasks.draw(skill, counts, seed=1)
            assert {split: len(samples) for split, samples in splits.items()} == counts
            samples = [sample for split in splits.values() for sample in split]
            assert len(set(samples)) == len(samples)
            assert splits == paper.tiny_tasks.draw(skill, counts, seed=1)
            assert splits != paper.tiny_tasks.draw(skill, counts, seed=2)
            for sample in samples:
                given = sample.prompt.removeprefix(f"{skill.instruction}: ").removesuffix("\n")
                assert sample.completion == skill.solve(given)


@pytest.mark.parametrize(
    ("task", "given", "answer"),
    [
        ("reverse", "abcde", "edcba"), ("double", "abc", "aabbcc"), ("rotate", "abcde", "cdeab"),
        ("swap", "abcde", "ebcda"), ("key_A", "abyz", "cdab"), ("key_F", "abz", "qrp"),
    ],
)  # fmt: skip
def test_answers_are_right(paper: Any, task: str, given: str, answer: str) -> None:
    skills = {**paper.tiny_tasks.INTER_DOMAIN, **paper.tiny_tasks.INTRA_DOMAIN}
    assert skills[task].solve(given) == answer


def multiple_choice(number: int, right: int = 2) -> dict[str, str]:
    """As LLM-Adapters writes it."""
    return {
        "instruction": f"Please choose the correct answer to the question: Which is {number}?\n\nAnswer1: one Answer2: "
        "a second: one Answer3: three\n\nAnswer format: answer1/answer2/answer3",
        "input": "", "output": f"the correct answer is answer{right}", "answer": f"answer{right}",
    }  # fmt: skip


def true_or_false(number: int, answer: str = "false") -> dict[str, str]:
    """As LLM-Adapters writes it."""
    return {
        "instruction": f"Please answer the following question with true or false, question: is it {number}?\n\n"
        "Answer format: true/false",
        "input": "", "output": f"the correct answer is {answer}", "answer": answer,
    }  # fmt: skip


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """LLM-Adapters' files of the intra-domain tasks, some levels down."""
    folder = tmp_path / "source" / "dataset"
    folder.mkdir(parents=True)
    for name in ("arc_easy", "arc_challenge", "openbookqa", "boolq"):
        make = true_or_false if name == "boolq" else multiple_choice
        for split, numbers in (("train", range(110)), ("test", range(200, 205))):
            (folder / f"{name}_{split}.json").write_text(json.dumps([make(number) for number in numbers]))
    return tmp_path / "source"


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_public_data_sets_become_tasks(paper: Any, source: Path, tmp_path: Path) -> None:
    tasks = {task.name: task for task in paper.real_tasks.write_real("intra_domain", source, tmp_path / "out", seed=1)}
    assert {task.kind for task in tasks.values()} == {"choice"}
    for name, options in (("arc_easy", [" one", " a second: one", " three"]), ("boolq", [" true", " false"])):
        task = tasks[name]
        questions = lines(task.tests[name])
        assert len(questions) == 5
        assert all((question["options"], question["right"]) == (options, 1) for question in questions)
        train, validation = lines(task.train), lines(task.validation)
        assert (len(train), len(validation)) == (10, 100)
        prompts = [record["prompt"] for record in (*questions, *train, *validation)]
        assert len(set(prompts)) == len(prompts)
        assert all(re.fullmatch(r"Question: (Which is|is it) \d+\?( True or false\?)?\nAnswer:", p) for p in prompts)
        assert {record["completion"] for record in (*train, *validation)} == {options[1]}


@pytest.mark.parametrize(
    ("name", "record", "message"),
    [
        ("arc_easy", multiple_choice(1, right=4), "record 3: is no multiple-choice record"),
        ("arc_easy", multiple_choice(1) | {"answer": "2"}, "record 3: is no multiple-choice record"),
        ("arc_easy", true_or_false(1), "record 3: is no multiple-choice record"),
        ("openbookqa", {"question": "?"}, "record 3: no column 'instruction'"),
        ("boolq", true_or_false(1, answer="maybe"), "record 3: is no true-or-false record"),
    ],
)
def test_records_of_another_form_are_named(
    paper: Any, source: Path, tmp_path: Path, name: str, record: dict[str, str], message: str
) -> None:
    (file,) = source.rglob(f"{name}_train.json")
    records = json.loads(file.read_text())
    file.write_text(json.dumps([*records[:2], record, *records[3:]]))
    with pytest.raises(DataError, match=re.escape(f"{file}: {message}")):
        paper.real_tasks.write_real("intra_domain", source, tmp_path / "out", seed=1)


def test_a_missing_data_set_is_named(paper: Any, source: Path, tmp_path: Path) -> None:
    (file,) = source.rglob("boolq_test.json")
    file.unlink()
    with pytest.raises(ConfigError, match=r"--data.*holds no boolq_test\.json"):
        paper.real_tasks.write_real("intra_domain", source, tmp_path / "out", seed=1)


# ---- subspaces.py


def test_what_was_learned_is_what_the_start_does_not_explain(paper: Any) -> None:
    torch.manual_seed(1)
    start, direction = torch.randn(2, 3, 16), torch.zeros(2, 3, 16)
    direction[:, 0, 0] = 1.0
    decayed = paper.subspaces.Factors(0.9 * start, start, start, shared=None)
    assert decayed.learned_share < 1e-12
    moved = paper.subspaces.Factors(0.9 * start + 100 * direction, start, start, shared=None)
    assert moved.learned_share > 0.9


# ---- sweep.py


def test_a_sweep_goes_on_where_it_was(paper: Any, a_run: Any, tmp_path: Path) -> None:
    runs = [a_run(keeps=True), a_run(seed=2), a_run(name="the first again")]
    workers = paper.sweep.Workers(jobs=2, threads=1)
    try:
        results = workers.run_all(runs, tmp_path, "sweep")
        assert [one["seed"] for one in results] == [1, 2, 1]
        assert len(list(tmp_path.glob("*.json"))) == 2, "equal runs are made once"
        assert results[0]["tests"].keys() == {"reverse", "add"}
        kept, other = (tmp_path / f"{run.identity}.json" for run in runs[:2])
        assert {file.name for file in tmp_path.iterdir()} == {kept.name, other.name, f"{kept.stem}.safetensors"}
        factors = paper.subspaces.read_factors(paper.sweep.adapter_file(kept), runs[0])
        assert len(factors) == 2 * 7, "layers times projections"
        moved = {site: share for site, found in factors.items() if (share := found.learned_share) > 0.01}
        assert moved == {}, "two small steps cannot leave the start, which is drawn again"
        before = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
        other.unlink()
        assert [one["tests"] for one in workers.run_all(runs, tmp_path, "sweep")] == [one["tests"] for one in results]
        after = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
        assert [name for name, when in after.items() if when != before[name]] == [other.name]

        mixed = [a_run(seed=3), a_run(name="broken", method="no_such"), a_run(seed=4)]
        with pytest.raises(paper.sweep.RunError, match=r"(?s)^broken, lr 0\.001, seed 1:.*no_such"):
            workers.run_all(mixed, tmp_path, "sweep")
        made = [(tmp_path / f"{run.identity}.json").is_file() for run in mixed]
        assert made[:2] == [True, False], "what the other worker was at is finished"
        assert workers.run_all(mixed[2:], tmp_path, "sweep")[0]["seed"] == 4, "the workers still work"
    finally:
        workers.close()


# ---- scoring.py


def _sample(tokens: Tensor, prompt: int) -> TokenizedExample:
    return TokenizedExample(tokens.tolist(), [False] * prompt + [True] * (len(tokens) - prompt))


def continued(model: LlamaForCausalLM, prompt: str, llama: Path) -> tuple[Tensor, int]:
    """(the prompt with five tokens of greedy decoding, length of the prompt)."""
    ids = AutoTokenizer.from_pretrained(llama)(f"<s>{prompt}", return_tensors="pt", add_special_tokens=False).input_ids
    decoded = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    return decoded[0], ids.shape[1]


@torch.no_grad()
def answer_loss(model: LlamaForCausalLM, sample: TokenizedExample) -> float:
    """Summed over the answer's tokens."""
    tokens = torch.tensor(sample.token_ids)
    logs = model(tokens[None]).logits[0].log_softmax(-1)
    return -sum(float(logs[i - 1, tokens[i]]) for i in range(1, len(tokens)) if sample.trained[i])


def test_scores_are_those_of_transformers(
    workers: WorkerPool, llama_dir: Path, base_dir: Path, task_files: list[Path], tmp_path: Path
) -> None:
    """B starts at zero: the untrained adapter is the base. Tolerance: float32 through two implementations."""
    model = LlamaForCausalLM.from_pretrained(llama_dir).eval()
    samples, is_greedy = [], []
    for i, prompt in enumerate(("reverse abc:", "what is 12+34?  ", "7", "reverse qrstuv: now", "0 + 1 = ")):
        tokens, length = continued(model, prompt, llama_dir)
        samples.append(_sample(tokens, length))
        changed = tokens.clone()
        changed[length + i] = (changed[length + i] + 1) % 50  # each of the five tokens once
        samples.append(_sample(changed, length))
        is_greedy += [True, False]
    losses = [answer_loss(model, sample) for sample in samples]

    options = ["ab", "7", "hello there"]
    encode = AutoTokenizer.from_pretrained(llama_dir)
    sums = []
    for option in options:
        prompt, answer = (encode(text, add_special_tokens=False).input_ids for text in ("which? ", option))
        sums.append(answer_loss(model, _sample(torch.tensor([*prompt, *answer, 2]), len(prompt))))
    choices = tmp_path / "choices.jsonl"
    records = [{"prompt": "which? ", "options": options, "right": right} for right in range(3)]
    choices.write_text("".join(json.dumps(record) + "\n" for record in records))

    overrides = [
        f"pretrained_checkpoint={base_dir}", f"data=[{{path: '{task_files[0]}'}}]", "seq_length=64",
        "micro_batch_size=2", "global_batch_size=2", "validation_samples=0", "eval_iters=0", "method=malora",
        "lora_rank=2", "shared_dim=4",
    ]  # fmt: skip
    ((found, by_choice),) = workers.run(
        "jobs_paper:scores", 1, overrides=overrides, samples=samples, choices=choices, llama=llama_dir
    )
    assert found[0].tolist() == pytest.approx(losses, abs=1e-4)
    assert found[1].tolist() == [5] * len(samples)
    assert found[2].tolist() == is_greedy
    assert by_choice["right"] == "".join(str(int(right == int(np.argmin(sums)))) for right in range(3))
    lengths = [len(option) + 1 for option in options]  # a token a character, and EOS
    assert by_choice["losses"] == pytest.approx([s / n for s, n in zip(sums, lengths, strict=True)], abs=1e-4)


# ---- parameters.py, latency.py


def test_the_paper_gives_shares_of_base_and_adapter(paper: Any) -> None:
    """Every share of its table 1; two of six would be others of the base alone."""
    base = paper.parameters.base_of("llama2-7b")
    agrees = {
        row.cell.name: paper.parameters.agreement(paper.scales.candidate_of(row.cell, base), row.percent)
        for row in paper.parameters.TABLE_1
        if row.percent is not None
    }
    assert {name for name, found in agrees.items() if not found.endswith("of base + adapter")} == set()
    assert {name for name, found in agrees.items() if "of base," not in found} == {"AsyLoRA", "MALoRA"}


def test_step_time_knows_every_option(paper: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    step_time = importlib.import_module("step_time")  # report.py has put its folder on the path
    for scale in paper.latency.OPTIONS:
        command = paper.latency.command_for(scale, ["--layers", "2"], Path("out.json"))
        monkeypatch.setattr(sys, "argv", command[1:])
        args = step_time.parse()
        assert (args.layers, args.output, args.memory) == (2, Path("out.json"), False)
        assert args.methods == [row.method for row in paper.latency.ROWS]


def test_the_papers_steps_have_the_ratios_of_its_table(paper: Any) -> None:
    steps = {row.name: row.paper_step / paper.latency.LORA.paper_step for row in paper.latency.ROWS}
    assert {name: round(ratio, 3) for name, ratio in steps.items() if "," not in name} == {
        "LoRA": 1.0, "DoRA": 1.224, "MoLoRA": 1.286, "MALoRA": 1.075,
    }  # fmt: skip


# ---- the scripts

RUN_ALL = """
import runpy, sys
if __name__ == "__main__":
    scripts, options = sys.argv[1].split(","), sys.argv[2:]
    for script in scripts:
        sys.argv = [script, *options]
        runpy.run_path(script, run_name="__main__")
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of all scripts: two steps, one seed, one process, since most of the time goes into starting one."""
    out = tmp_path_factory.mktemp("paper")
    options = ["--scale", "tiny", "--seeds", "1", "--steps", "2", "--jobs", "0", "--out", str(out)]
    path = os.pathsep.join([str(PAPER), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL, ",".join(map(str, SCRIPTS)), *options],
        capture_output=True, text=True, timeout=1800, env={**os.environ, "PYTHONPATH": path}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return out / "tiny_2_steps"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_every_script_writes_its_files(written: Path, script: Path) -> None:
    files = {suffix: written / f"{script.stem}.{suffix}" for suffix in ("json", "md", "png")}
    content = json.loads(files["json"].read_text())
    assert content["command"].startswith(f"python tools/paper/{script.name} --scale tiny")
    assert re.search(r"^\| --- \|", files["md"].read_text(), re.MULTILINE), "no table"
    assert files["png"].stat().st_size > 5000
