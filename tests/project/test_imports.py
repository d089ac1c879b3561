"""Imports go one way, and importing the core loads none of the heavy libraries."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import ROOT

CORE, RUNTIMES, EXPORT = "edge_memllm", "edge_memllm_runtimes", "edge_memllm_export"
LAYERS = {
    CORE: ROOT / CORE,
    RUNTIMES: ROOT / "runtimes" / RUNTIMES,
    EXPORT: ROOT / "export" / EXPORT,
}
HEAVY = ("torch", "onnx", "onnx_ir", "onnxruntime", "transformers", "optimum", "accelerate")
# What a module of each layer must not import when it is loaded. Inside functions it may.
FORBIDDEN = {
    CORE: (*HEAVY, RUNTIMES, EXPORT),
    RUNTIMES: (*(name for name in HEAVY if name != "onnxruntime"), EXPORT),
    EXPORT: ("optimum", "accelerate"),
}
# The torch half of the project: the network, the judge made of it, what looks into weights,
# and what stands on transformers.
TORCH_MODULES = (
    "edge_memllm.modeling",
    "edge_memllm.huggingface",
    "edge_memllm.interpretation.network",
    "edge_memllm_runtimes.torch_reference",
)


def modules() -> Iterator[tuple[str, str, Path]]:
    for layer, folder in LAYERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder.parent).with_suffix("").parts
            yield layer, ".".join(part for part in parts if part != "__init__"), path


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported_by(node: ast.AST) -> list[str]:
    match node:
        case ast.Import(names=names):
            return [name.name for name in names]
        case ast.ImportFrom(module=str(module)):
            return [module]
    return []


def imported_at_load(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of what runs when the module is loaded: not in functions, not for typing."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((node.lineno, name) for name in imported_by(node))
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting.extend(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting.extend(ast.iter_child_nodes(node))


def starts_with(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


@pytest.mark.parametrize(
    ("layer", "name", "path"), [pytest.param(*each, id=each[1]) for each in modules()]
)
def test_a_module_imports_only_its_own_layer_and_those_below(
    layer: str, name: str, path: Path
) -> None:
    forbidden = FORBIDDEN[layer]
    if starts_with(name, TORCH_MODULES):
        forbidden = (EXPORT,) if layer == RUNTIMES else (RUNTIMES, EXPORT)
    elif layer != EXPORT:
        forbidden = (*forbidden, "edge_memllm.modeling")
    wrong = [
        f"line {line}: {imported}"
        for line, imported in imported_at_load(ast.parse(path.read_text("utf-8")))
        if starts_with(imported, forbidden)
    ]
    assert not wrong, f"{name} imports outward when it is loaded: {wrong}"


def loaded_after(statement: str) -> set[str]:
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    return set(json.loads(done.stdout))


@pytest.mark.parametrize(
    "statement",
    [
        "import edge_memllm",
        "from edge_memllm import Model, Sampling, load",
        "import edge_memllm_runtimes, edge_memllm.evaluation.perplexity",
        "from edge_memllm.hub import artifact_folder",
    ],
)
def test_importing_the_core_loads_no_heavy_library(statement: str) -> None:
    loaded = loaded_after(statement)
    assert not loaded.intersection({*HEAVY, "huggingface_hub"})


def test_importing_the_package_alone_loads_next_to_nothing() -> None:
    ours = {name for name in loaded_after("import edge_memllm") if name.startswith("edge_memllm")}
    assert ours == {"edge_memllm"}


def test_onnxruntime_is_imported_through_one_door() -> None:
    """Which turns off its telemetry first."""
    programs = [path for name in ("benchmarks", "docs", "examples") for path in python_files(name)]
    door = ROOT / "runtimes" / RUNTIMES / "ort_library.py"
    wrong = {
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in {path for *_, path in modules()} - {door} | set(programs)
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        for name in imported_by(node)
        if starts_with(name, ("onnxruntime",))
    }
    assert not wrong
