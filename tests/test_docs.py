"""What the documentation says exists: links, commands, keys, example records, configs, dependencies."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from malora_dist.config import SECTIONS
from malora_dist.config_file import load_config
from malora_dist.config_sections import TaskConfig
from malora_dist.data.formats import load_examples
from malora_dist.fields import rules_of
from malora_dist.methods.base import METHODS
from malora_dist.methods.spec import AdapterSpec
from tests.layouts import LAYOUTS, label

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]

#: Every file of configs/ and the number of processes it is written for.
WORLD_SIZES = {"quickstart": 2, "stories260k": 2, "llama3_8b_1x8": 8, "llama3_8b_4x8": 32}


def tool(name: str) -> ModuleType:
    """A file of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands() -> Iterator[tuple[str, list[str]]]:
    """(where, words) of each command of the pages' bash blocks and of the comments at the head of each config."""
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                yield page.name, shlex.split(line, comments=True)
    for file in sorted((ROOT / "configs").rglob("*.yaml")):
        lines = re.findall(r"^#   (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
        for line in "\n".join(lines).replace("\\\n", " ").splitlines():
            yield file.name, shlex.split(line)


COMMANDS = [(where, words) for where, words in commands() if words]


def test_the_table_of_keys_is_up_to_date() -> None:
    docs = tool("make_config_docs")
    assert docs.TARGET.read_text(encoding="utf-8") == docs.render(), "run `python tools/make_config_docs.py`"


def test_keys_in_the_readme_have_the_defaults_it_gives() -> None:
    docs = tool("make_config_docs")
    defaults = {f.name: docs.default_of(f) for section in SECTIONS for f in dataclasses.fields(section)}
    rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \|", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) > 10, "the README's table of keys was not found"
    assert {key: default for key, default in rows if defaults.get(key) != default} == {}


def test_defaults_in_words_are_those_of_the_methods() -> None:
    """lora_rank is 12 for MALoRA and the ablations made of it, 8 for all others."""
    ranks = {method: AdapterSpec(method=method).lora_rank for method in METHODS}
    assert {method for method, rank in ranks.items() if rank == 12} == {"malora", "malora_b", "malora_unshared"}
    assert {rank for rank in ranks.values() if rank != 12} == {8}
    assert all(AdapterSpec(method=method).lora_alpha == 2.0 * ranks[method] for method in ranks)


def test_every_method_has_a_row_in_the_readme_and_in_the_page_of_methods() -> None:
    for page in (README, ROOT / "docs" / "methods.md"):
        text = page.read_text(encoding="utf-8")
        assert [method for method in METHODS if f"`{method}`" not in text] == [], page.name


def test_every_config_is_listed() -> None:
    assert {file.stem for file in (ROOT / "configs").glob("*.yaml")} == set(WORLD_SIZES)


@pytest.mark.parametrize("name", WORLD_SIZES)
def test_configs_fit_their_number_of_processes(name: str) -> None:
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    config.validate(WORLD_SIZES[name])
    assert config.is_mixture
    assert not any(Path(task.path).is_absolute() for task in config.data)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_point_to_files(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not link.startswith(("https://", "http://")):
            assert (page.parent / link.partition("#")[0]).exists(), f"{page.name} links to {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_named_in_the_text_exist(page: Path) -> None:
    named = re.findall(r"`((?:launch|tools|configs|tests|docs|malora_dist)/[\w./]*)`", page.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize(("where", "words"), COMMANDS, ids=lambda value: value if isinstance(value, str) else value[0])
def test_commands_name_what_exists(where: str, words: list[str]) -> None:
    for word in words:
        if re.match(r"(launch|tools|configs|tests)/", word):
            assert list(ROOT.glob(word.partition("::")[0])), f"{where}: {word}"
    if "-m" in words:
        module = words[words.index("-m") + 1]
        if module.startswith("malora_dist"):
            assert importlib.util.find_spec(module) is not None, f"{where}: {module}"


def _after(words: list[str], name: str) -> list[str]:
    return words[words.index(name) + 1 :]


def test_training_commands_parse() -> None:
    """Config files load with the key=value pairs of the command."""
    found = [_after(words, "malora_dist.train") for _, words in COMMANDS if "malora_dist.train" in words]
    assert len(found) >= 3
    for words in found:
        assert words[0] == "--config"
        path = ROOT / words[1]
        load_config(path if path.exists() else None, words[2:])


def test_conversion_commands_parse() -> None:
    parser = tool("convert_hf").build_parser()
    found = [_after(words, "tools/convert_hf.py") for _, words in COMMANDS if "tools/convert_hf.py" in words]
    assert {words[0] for words in found} == {
        "import",
        "export",
        "export-adapter",
        "import-adapter",
        "roundtrip",
        "verify",
    }
    for words in found:
        parser.parse_args(words)


def test_budget_commands_parse() -> None:
    parser = tool("budget").build_parser()
    found = [_after(words, "tools/budget.py") for _, words in COMMANDS if "tools/budget.py" in words]
    assert len(found) >= 3
    for words in found:
        parser.parse_args(words)


def test_evaluation_commands_name_options_that_exist() -> None:
    source = (ROOT / "malora_dist" / "hf" / "evaluate.py").read_text(encoding="utf-8")
    found = [word for _, words in COMMANDS if "tools/evaluate.py" in words for word in words if word.startswith("--")]
    assert found
    assert [option for option in found if f'"{option}"' not in source] == []


def test_yaml_examples_load(tmp_path: Path) -> None:
    found = [(page, block) for page in PAGES for block in blocks(page, "yaml")]
    assert found
    for page, block in found:
        file = tmp_path / f"{page.stem}.yaml"
        file.write_text(block, encoding="utf-8")
        load_config(file).validate(world_size=2)


def test_example_records_are_read(tmp_path: Path) -> None:
    """Each line of the README's block of records is one format; their columns tell which."""
    (block,) = blocks(README, "json")
    records = {tuple(json.loads(line)): line for line in block.splitlines()}
    assert len(records) == len(rules_of(TaskConfig, "format").choices) - 1, "one record of each format, but for auto"
    del records[("messages",)]  # needs a tokenizer with a chat template
    for line in records.values():
        file = tmp_path / "one.jsonl"
        file.write_text(line + "\n", encoding="utf-8")
        (example,) = load_examples(TaskConfig(path=str(file)))
        assert example.prompt
        assert example.answer


def test_python_examples_import_what_exists() -> None:
    for page in PAGES:
        for block in blocks(page, "python"):
            for node in ast.walk(ast.parse(block)):
                modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                for module in modules:
                    assert importlib.util.find_spec(module) is not None, f"{page.name}: {module}"


def test_dependencies_are_those_of_setup() -> None:
    """docs/dependencies.md has one row per requirement of setup.py, with its range."""
    call = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body[-1]
    assert isinstance(call, ast.Expr)
    assert isinstance(call.value, ast.Call)
    arguments = {keyword.arg: keyword.value for keyword in call.value.keywords}
    wanted = ast.literal_eval(arguments["install_requires"])
    for extra in ast.literal_eval(arguments["extras_require"]).values():
        wanted += extra
    text = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
    assert sorted(rows) == sorted(set(wanted)), "an extra may repeat another's"


def test_the_table_of_layouts_is_that_of_the_tests() -> None:
    text = (ROOT / "docs" / "layouts.md").read_text(encoding="utf-8")
    rows = [
        line.split(" | ") for line in text.split("|---|---|---|---|---|---|---|---|\n")[1].split("\n\n")[0].splitlines()
    ]
    found = [[cell.strip("| ") for cell in row] for row in rows]
    expected = [
        [
            layout.name,
            *map(str, (layout.processes, layout.tp, layout.pp)),
            "/".join(map(str, layout.stages)) or str(layout.chunks),
            *map(str, (layout.dp, layout.ep)),
            label(layout.methods),
        ]
        for layout in LAYOUTS
    ]
    assert found == expected
