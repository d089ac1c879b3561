"""The project as a whole: what is packaged, how long files are, what no file may contain."""

from __future__ import annotations

import ast
import re
import shutil
import stat
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import ROOT

PACKAGES = (ROOT / "edge_memllm", ROOT / "runtimes", ROOT / "export")
NAMES = ("kernels", "tests", "docs", "examples", "benchmarks", ".ci", ".github")
FOLDERS = (*PACKAGES, *(ROOT / name for name in NAMES))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))

# In a namespace that Optimum and its plugins share: nobody's `__init__.py` may be there.
PLUGIN = Path("optimum/commands/register/register_edge_memllm.py")

_LEFT_BEHIND = re.compile(r"__pycache__|\.egg-info|_cache/|^kernels/build/|\.(so|dylib|dll)$")
TEXT = {
    ".cpp",
    ".h",
    ".in",
    ".py",
    ".md",
    ".toml",
    ".txt",
    ".json",
    ".svg",
    ".css",
    ".js",
    ".yml",
    ".sh",
    ".lock",
    "",
}
MOST_LINES = 600


def files() -> Iterator[Path]:
    """The files of the project, without what building and testing leave behind."""
    yield from (path for path in ROOT.iterdir() if path.is_file() and path.name != ".git")
    for folder in FOLDERS:
        for path in folder.rglob("*"):
            if path.is_file() and not _LEFT_BEHIND.search(str(path.relative_to(ROOT))):
                yield path


def text_files() -> list[Path]:
    return [path for path in files() if path.suffix in TEXT]


def python_files() -> list[Path]:
    return [path for path in files() if path.suffix == ".py"]


def modules() -> set[str]:
    """Every module of the packages as a path in the wheel."""
    found = {path.relative_to(ROOT) for path in PACKAGES[0].rglob("*.py")}
    for folder in PACKAGES[1:]:
        found |= {path.relative_to(folder) for path in folder.rglob("*.py")}
    return {path.as_posix() for path in found}


def test_every_file_is_short() -> None:
    lengths = {path: len(path.read_text("utf-8").splitlines()) for path in python_files()}
    too_long = {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > MOST_LINES}
    assert not too_long


def test_every_test_lies_in_the_folder_of_its_part() -> None:
    assert not list((ROOT / "tests").glob("test_*.py"))


def test_the_wheel_holds_every_module_and_its_data(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in PACKAGES:
        shutil.copytree(
            folder, source / folder.name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    script = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    command = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    packed = {name for name in names if name.endswith(".py")}
    assert packed == modules()
    assert "edge_memllm_export/quality_text.txt" in names
    assert {f"edge_memllm/interpretation/report/page.{end}" for end in ("css", "js")} <= names
    page = (path for path in (PACKAGES[0] / "server" / "page").iterdir() if path.is_file())
    assert {f"edge_memllm/server/page/{path.name}" for path in page} <= names
    assert {name for name in names if name.startswith("optimum")} == {PLUGIN.as_posix()}
    assert {name for name in names if name.endswith("py.typed")} == {
        f"{package}/py.typed"
        for package in ("edge_memllm", "edge_memllm_export", "edge_memllm_runtimes")
    }
    version = re.search(
        r'__version__ = "(.+)"', (PACKAGES[0] / "artifact" / "producer.py").read_text("utf-8")
    )
    assert version is not None
    assert wheel.name.startswith(f"edge_memllm-{version[1]}-")


def test_every_folder_with_modules_is_a_package() -> None:
    folders = {Path(name).parent for name in modules()} - {PLUGIN.parent}
    assert {folder.as_posix() + "/__init__.py" for folder in folders} <= modules()


# Assembled, so that this file does not contain what it looks for.
_HOMES = re.compile("|".join(f"/{name}/" for name in ("home", "Users", "root", "work", "mnt")))


def test_no_file_knows_the_machine_it_was_written_on() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip():.80}"
        for path in text_files()
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if _HOMES.search(line)
    ]
    assert not found


# No package index has a distribution of this name.
_PROMISE = re.compile(r"pip install (?:-\S+ )*['\"]?edge[-_]memllm(?!\S*\.whl)")


@pytest.mark.parametrize(
    ("text", "promised"),
    [
        ("pip install edge-memllm", True),
        ("pip install -U 'edge-memllm[serve]'", True),
        ("pip install './edge_memllm-0.1.0-py3-none-any.whl[serve]'", False),
        ("pip install '.[serve]' in a clone of edge-memllm", False),
    ],
)
def test_a_promise_would_be_found(text: str, promised: bool) -> None:
    assert bool(_PROMISE.search(text)) == promised


def test_nothing_promises_a_package_of_an_index() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in text_files()
        if path != Path(__file__)
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if _PROMISE.search(line)
    ]
    assert not found


PICKLERS = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal"}


def pickling(tree: ast.Module) -> Iterator[str]:
    """Every way of a module to write or read pickles."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (each.name for each in names if each.name.split(".")[0] in PICKLERS)
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in PICKLERS:
                yield module
            case ast.keyword(arg="allow_pickle", value=value):
                if not (isinstance(value, ast.Constant) and value.value is False):
                    yield "allow_pickle"
            case ast.Attribute(value=ast.Name(id="torch"), attr="load" | "save"):
                yield f"torch.{node.attr}"


def test_nothing_is_pickled() -> None:
    for path in python_files():
        assert list(pickling(ast.parse(path.read_text("utf-8")))) == [], path


def test_pickling_would_be_found() -> None:
    source = "import pickle\nfrom dill import dump\ntorch.load(f)\nx(allow_pickle=True)\n"
    found = list(pickling(ast.parse(source)))
    assert sorted(found) == ["allow_pickle", "dill", "pickle", "torch.load"]


def test_no_weights_but_safetensors() -> None:
    pickles = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
    assert [path for path in files() if path.suffix in pickles] == []


def test_shipped_models_are_small() -> None:
    assert sum(path.stat().st_size for path in (ROOT / "examples").rglob("*")) <= 25_000_000


def test_dependencies_have_both_ends_and_the_core_is_light() -> None:
    project = PROJECT["project"]
    extras = project["optional-dependencies"]
    core = {re.split(r"[<>=]", each)[0] for each in project["dependencies"]}
    assert core == {"jinja2", "numpy", "onnxruntime", "tokenizers", "tqdm", "xxhash"}
    for each in (*project["dependencies"], *(each for extra in extras.values() for each in extra)):
        if not each.startswith(("edge-memllm[", "setuptools")):
            assert re.search(r">=[\d.]+,<[\d.]+$", each), each


def test_continuous_integration_runs_the_tests_and_the_real_model() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & stat.S_IXUSR
    assert "set -euo pipefail" in script.read_text("utf-8")
    assert script.read_text("utf-8").rstrip().endswith("make test real")
