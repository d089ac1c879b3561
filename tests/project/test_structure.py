"""The house: a file holds one idea, a folder about a dozen of them, imports make no circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "edge_memllm": ROOT / "edge_memllm",
    "edge_memllm_runtimes": ROOT / "runtimes" / "edge_memllm_runtimes",
    "edge_memllm_export": ROOT / "export" / "edge_memllm_export",
}
# About: each of them is there to be noticed, and to be looked at again by whoever goes beyond.
MOST_LINES = 600
MOST_MODULES = 14
LONG_FUNCTION = 30


@cache
def modules() -> dict[str, Path]:
    found = {}
    for name, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = (name, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def test_a_file_is_short_enough_to_hold_one_idea() -> None:
    lengths = {name: len(path.read_text("utf-8").splitlines()) for name, path in modules().items()}
    assert {name: n for name, n in lengths.items() if n > MOST_LINES} == {}


def test_a_folder_holds_about_a_dozen_modules() -> None:
    counts: dict[str, int] = {}
    for path in modules().values():
        if path.name not in ("__init__.py", "__main__.py"):
            folder = path.parent.relative_to(ROOT).as_posix()
            counts[folder] = counts.get(folder, 0) + 1
    assert {folder: n for folder, n in counts.items() if n > MOST_MODULES} == {}


def test_functions_are_short_and_few_are_not() -> None:
    lengths = sorted(
        node.end_lineno - node.lineno + 1
        for path in modules().values()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None
    )
    assert lengths[int(0.9 * len(lengths))] <= LONG_FUNCTION


def imports(source: ast.AST, known: dict[str, Path] | frozenset[str]) -> Iterator[str]:
    """Every module of ours that is named by an import: at the top, in functions, for types."""
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names if each.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for each in node.names:
                inside = f"{node.module}.{each.name}"
                if inside in known:
                    yield inside
                elif node.module in known:
                    yield node.module


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Every circle that a walk along the edges comes upon, as the names in its order."""
    found, done, way = [], set[str](), list[str]()

    def walk(name: str) -> None:
        if name in way:
            found.append([*way[way.index(name) :], name])
        elif name not in done:
            way.append(name)
            for target in sorted(edges[name]):
                walk(target)
            done.add(way.pop())

    for name in edges:
        walk(name)
    return found


def test_imports_make_no_circle_not_even_lazy_ones_or_those_for_types() -> None:
    known = modules()
    edges = {name: set(imports(tree(path), known)) - {name} for name, path in known.items()}
    assert circles(edges) == []


@pytest.mark.parametrize(
    "statement",
    [
        "from a.c import x",
        "import a.c",
        "from a import c",
        "def f():\n    from a.c import x",
        "if TYPE_CHECKING:\n    from a.c import x",
    ],
)
def test_a_circle_would_be_found(statement: str) -> None:
    known = frozenset({"a.b", "a.c"})
    edges = {"a.b": set(imports(ast.parse(statement), known)), "a.c": {"a.b"}}
    assert circles(edges) == [["a.b", "a.c", "a.b"]]
