"""tools/budget.py through its command line: rows, tables, JSON, and one-line errors."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from malora_dist.methods.base import METHODS
from tests.test_docs import tool

PAPER = Path(__file__).resolve().parents[1] / "configs" / "paper"
WITHOUT_O = "target_modules=[q_proj,k_proj,v_proj,gate_proj,up_proj,down_proj]"
Run = Callable[..., dict[str, dict[str, Any]]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs the tool on LLaMA-2 7B's shapes and returns {name: row} of its JSON."""
    budget = tool("budget")

    def run(*arguments: object) -> dict[str, dict[str, Any]]:
        report = tmp_path / "report.json"
        monkeypatch.setattr(sys, "argv", ["budget.py", "--json", str(report), *map(str, arguments)])
        budget.main()
        return {row["name"]: row for row in json.loads(report.read_text())["rows"]}

    return run


def test_every_method_has_a_row_with_its_defaults(run: Run) -> None:
    rows = run()
    assert list(rows) == list(METHODS)
    assert (rows["malora"]["lora_rank"], rows["malora"]["shared_dim"]) == (12, 32)
    assert (rows["lora"]["lora_rank"], rows["lora"]["shared_dim"]) == (8, None)
    assert all(row["scaling"] == 2.0 for row in rows.values())
    assert list(rows["asymmetric_lora"]["frozen"]) == ["A"]


def test_the_papers_configs_have_the_papers_sizes(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Table 1: 143.1 M is 2.1% for LoRA, 109.1 M is 1.6% for MALoRA-Small."""
    rows = run("--config", PAPER / "inter_domain_lora.yaml", PAPER / "inter_domain_malora_small.yaml")
    lora, small = rows["inter_domain_lora"], rows["inter_domain_malora_small"]
    assert (round(lora["total"] / 1e6, 1), round(small["total"] / 1e6, 1)) == (143.1, 109.1)
    assert (round(100 * lora["of_all"], 1), round(100 * small["of_all"], 1)) == (2.1, 1.6)
    printed = capsys.readouterr().out
    assert "llama2-7b, 6,738 M parameters" in printed
    (line,) = (line.split() for line in printed.splitlines() if "malora_small" in line)
    assert line[1:4] == ["8", "22", "2"]
    assert sorted(line[4:8]) == ["0.2703", "22.17", "78.64", "8.061"]  # P, S, B, router
    assert line[8:] == ["109.1", "1.62%", "1.59%"]


def test_keys_behind_config_files_count_for_every_row(run: Run) -> None:
    rows = run("--config", PAPER / "inter_domain_lora.yaml", PAPER / "inter_domain_dora.yaml", "lora_rank=32")
    assert {row["lora_rank"] for row in rows.values()} == {32}


def test_a_model_is_read_from_its_config_alone(run: Run, tmp_path: Path) -> None:
    LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                vocab_size=50, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)  # fmt: skip
    for model in (tmp_path, tmp_path / "config.json"):
        rows = run("--hf-model", model, "target_modules=[k_proj]", "num_lora_experts=4", "lora_rank=2", "shared_dim=8")
        assert rows["malora"]["trained"] == {
            "router": 3 * 4 * 64, "S": 3 * 8 * 64, "P": 3 * 4 * 2 * 8, "B": 3 * 4 * 32 * 2,
        }  # fmt: skip


def test_match_makes_every_method_as_large_as_the_reference(run: Run) -> None:
    rows = run("--match", "method=molora", "lora_rank=8", WITHOUT_O)
    assert next(iter(rows)) == "molora"
    assert set(rows) == set(METHODS)
    budget = rows["molora"]["total"]
    assert all(0.9 * budget < row["total"] <= budget for row in rows.values())
    assert all(row["scaling"] == 2.0 for row in rows.values())
    assert rows["lora"]["lora_rank"] == 67  # 2.236 M for each rank: 150 of 151.2 M


def test_match_can_choose_the_shared_dim(run: Run) -> None:
    rows = run("--match", "--solve", "shared_dim", "method=molora", "lora_rank=8", WITHOUT_O)
    assert (rows["malora"]["lora_rank"], rows["malora"]["shared_dim"]) == (8, 63)


def test_methods_that_cannot_be_are_left_out_with_their_reason(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run("shared_dim=22")
    assert set(METHODS) - set(rows) == {"malora_unshared"}
    assert "malora_unshared is left out: shared_dim=22: must be divisible by num_lora_experts=8" in (
        capsys.readouterr().out
    )


def test_the_rank_rule(run: Run) -> None:
    rows = run("--rank-rule", 8, WITHOUT_O)
    widths = [(row["shared_dim"], row["lora_rank"]) for row in rows.values()]
    assert widths == [(None, 8), (16, 14), (32, 12), (48, 10), (64, 8)]
    assert all(0.95 < row["total"] / rows["molora"]["total"] < 1.15 for row in rows.values())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--shape", "llama9"], "--shape='llama9': must be one of llama2-7b, llama3-8b; use --hf-model for another"),
        (["--hf-model", "nowhere"], "nowhere: has no config.json; name the directory of a Hugging Face model"),
        (["lora_rnk=4"], "lora_rnk=4: is not a config key; did you mean lora_rank?"),
        (["--match", "method=lra"], "method='lra': must be one of asymmetric_lora, "),
        (["--match", "shared_dim=5000"], "shared_dim=5000: must not exceed the input width 4096 of q_proj"),
        (["topk=9"], "topk=9: must not exceed num_lora_experts=8"),
        (["--rank-rule", "0"], "lora_rank=0: must be at least 1"),
        (["--solve", "shared_dim"], "--solve='shared_dim': belongs to --match; add --match"),
        (["--match", "--config", "a.yaml", "b.yaml"], "--config=['a.yaml', 'b.yaml']: must be one file with --match"),
        (["--json", "nowhere/a.json"], "--json='nowhere/a.json': lies in no existing directory; create it first"),
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_one_line(
    run: Run, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(*arguments)
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {expected}")
    assert printed.err.count("\n") == 1
    assert printed.out == ""
