"""The package's layers, checked on the syntax tree of every file: who may import whom, and nothing else at import."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "malora_dist"


@dataclass(frozen=True)
class Layer:
    """What a top-level package or module of malora_dist may import besides itself."""

    imports: str
    megatron: bool = False


#: Lowest first: a row may only name rows above it. docs/architecture.md gives the reasons.
LAYERS = {
    "errors": Layer(""),
    "exit_codes": Layer(""),
    "files": Layer("errors"),
    "pretrained": Layer("errors files"),
    "progress": Layer(""),
    "fields": Layer("errors"),
    "registry": Layer("errors"),
    "methods": Layer("errors fields registry"),
    "config_sections": Layer("files fields"),
    "config": Layer("errors files fields methods config_sections"),
    "config_file": Layer("errors files config_sections config"),
    "kernels": Layer("methods"),
    "parallel": Layer("errors config_sections config", megatron=True),
    "exchange": Layer("errors registry methods config kernels parallel"),
    "families": Layer("errors files registry methods"),
    "planning": Layer("methods families"),
    "layers": Layer("methods kernels exchange parallel", megatron=True),
    "models": Layer("errors methods config exchange parallel layers families", megatron=True),
    "data": Layer("errors files progress config_sections config"),
    "checkpoint": Layer("errors files methods config config_file parallel families layers pretrained", megatron=True),
    "metrics": Layer(
        "errors progress registry methods config kernels parallel exchange families planning layers models checkpoint"
    ),
    "training": Layer(
        "errors exit_codes methods config_sections config parallel exchange families layers models data checkpoint "
        "metrics planning pretrained progress",
        megatron=True,
    ),
    "hf": Layer("errors files methods config_sections config kernels data pretrained"),
    "inspection": Layer("errors files methods config families data checkpoint hf"),
    "launch": Layer("errors exit_codes parallel"),
    "train": Layer("errors files config_file parallel exchange metrics training"),
}
#: The only file that may import fmoe.
FMOE_FILE = PACKAGE / "exchange" / "fastmoe.py"

#: What may be called to make a module's constants, besides the project's own classes and functions and methods of
#: other constants.
CALLS_AT_IMPORT = {"cast", "frozenset", "re.compile", "tuple", "TypeVar"}
#: Files whose import is meant to do something, and what: {file: targets it may assign to}.
REGISTERS = {
    PACKAGE / "hf" / "__init__.py": {
        "PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING", "PEFT_TYPE_TO_PREFIX_MAPPING",
    }
}  # fmt: skip

FILES = sorted(PACKAGE.rglob("*.py"))
PRODUCT_FILES = [file for file in FILES if file != PACKAGE / "__init__.py"]


def name_of(file: Path) -> str:
    """Dotted name of a module of the package."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file) for file in FILES}


def layer_of(module: str) -> str:
    """``malora_dist.exchange.base`` -> ``exchange``."""
    return module.split(".")[1]


def imported_modules(source: str) -> Iterator[str]:
    """Every module a file imports, anywhere in it: also in functions, under TYPE_CHECKING and by import_module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; the project uses absolute ones"
            assert node.module is not None
            # `from package import module` is an import of the module.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else node.module for name in names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))


IMPORTS = {file: set(imported_modules(file.read_text(encoding="utf-8"))) for file in FILES}


def test_the_table_is_an_order_and_has_a_row_for_everything() -> None:
    rows = list(LAYERS)
    assert sorted(rows) == sorted({layer_of(name_of(file)) for file in PRODUCT_FILES})
    for i, (name, layer) in enumerate(LAYERS.items()):
        assert set(layer.imports.split()) <= set(rows[:i]), f"{name} may only import layers above it in the table"
    for side in ("methods", "kernels", "families", "data", "hf"):
        below = [side, *LAYERS[side].imports.split()]
        assert not any(LAYERS[name].megatron for name in below), f"{side} would reach megatron"


@pytest.mark.parametrize("file", PRODUCT_FILES, ids=lambda file: name_of(file))
def test_imports_point_downwards(file: Path) -> None:
    own = layer_of(name_of(file))
    allowed = {own, *LAYERS[own].imports.split()}
    for module in sorted(IMPORTS[file]):
        top, *rest = module.split(".")
        assert top not in ("tests", "tools"), f"the product imports {module}"
        if top == "malora_dist":
            assert rest, "import the module that is needed, not the whole package"
            assert rest[0] in allowed, f"{own} must not import {module}"
        if top == "megatron":
            assert LAYERS[own].megatron, f"{own} must not import {module}"
        if top in ("fmoe", "fmoe_cuda"):
            assert file == FMOE_FILE, f"only {FMOE_FILE.name} may import {module}"


def test_modules_import_each_other_in_no_circle() -> None:
    graph = {name_of(file): IMPORTS[file] & MODULES - {name_of(file)} for file in FILES}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def _is_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("__name__ == '__main__'", "TYPE_CHECKING")


def _calls_at_import(node: ast.AST) -> Iterator[ast.Call]:
    """Calls in an expression that run at once, those in the bodies of lambdas left out."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.Lambda):
            if isinstance(child, ast.Call):
                yield child
            yield from _calls_at_import(child)


def _names(body: list[ast.stmt]) -> tuple[set[str], set[str]]:
    """(names a file defines or imports from the project, names it gives to imported modules)."""
    own = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    modules: set[str] = set()
    for node in body:
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("malora_dist"):
            own |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
    return own, modules


def _check_assignment(file: Path, node: ast.Assign | ast.AnnAssign, own: set[str], modules: set[str]) -> None:
    for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
        registers = isinstance(target, ast.Subscript) and ast.unparse(target.value) in REGISTERS.get(file, ())
        assert isinstance(target, ast.Name) or registers, f"line {node.lineno} changes another object at import"
    for call in _calls_at_import(node):
        called = ast.unparse(call.func)
        is_method = isinstance(call.func, ast.Attribute) and called.split(".")[0] not in modules
        assert called in CALLS_AT_IMPORT | own or is_method, f"line {call.lineno} calls {called} at import"


@pytest.mark.parametrize("file", FILES, ids=lambda file: name_of(file))
def test_nothing_happens_at_import(file: Path) -> None:
    """Only definitions and constants at the top level; the tuner's registration is the one exception."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    own, modules = _names(body)
    for node in body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            _check_assignment(file, node, own, modules)
            continue
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_definition = isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef)
        assert is_docstring or is_definition or _is_guard(node), f"line {node.lineno}: {ast.unparse(node)[:80]}"
