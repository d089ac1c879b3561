"""The package edge-memllm-kernels: how it is built, what its wheel holds, what it says."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from edge_memllm import __version__
from support import ROOT

KERNELS = ROOT / "kernels"
SAY = "import edge_memllm_kernels as k; print(k.{})"
NAMES = ("", "avx2", "avx512-vnni")  # each more than those before it
CPUINFO = Path("/proc/cpuinfo")


def python(
    *arguments: str, folder: Path, check: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A Python of its own in a folder, whose modules come first."""
    left = {k: v for k, v in os.environ.items() if k not in ("CXX", "EDGE_MEMLLM_KERNELS")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**left, "PYTHONPATH": str(folder), **environment},
        capture_output=True,
        text=True,
        check=check,
        timeout=600,
    )


needs_compiler = pytest.mark.skipif(
    python("compiling.py", folder=KERNELS, check=False).returncode != 0,
    reason="needs a C++ compiler or the package ziglang",
)


def copied(folder: Path) -> Path:
    """The package as a clone has it, without what building leaves behind."""
    left = shutil.ignore_patterns("build", "__pycache__", "*.egg-info", "*.so", "*.dylib", "*.dll")
    return Path(shutil.copytree(KERNELS, folder / "kernels", ignore=left))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = ["-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation"]
    python(*command, "--wheel-dir", str(folder), str(copied(folder)), folder=folder)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's files, to be the first of a Python's."""
    folder = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def said(installed: Path, what: str, **environment: str) -> str:
    return python("-c", SAY.format(what), folder=installed, **environment).stdout.strip()


@needs_compiler
def test_one_wheel_for_all_pythons_of_a_platform(wheel: Path) -> None:
    name, version, *tag, platform = wheel.stem.split("-")
    assert (name, version, tag) == ("edge_memllm_kernels", __version__, ["py3", "none"])
    assert platform != "any"
    with zipfile.ZipFile(wheel) as files:
        names = set(files.namelist())
        said = files.read(f"{name}-{version}.dist-info/WHEEL").decode()
    assert "Root-Is-Purelib: false" in said
    library = {each for each in names if re.fullmatch(rf"{name}/\w+\.(so|dylib|dll)", each)}
    assert len(library) == 1
    held = {each for each in names if "dist-info" not in each}
    assert held == library | {f"{name}/__init__.py", f"{name}/py.typed"}
    assert f"{name}-{version}.dist-info/licenses/LICENSE" in names


def read_elf(path: str, *options: str) -> str:
    command = ["readelf", "--wide", *options, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@needs_compiler
@pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("readelf") is None, reason="needs readelf, and Linux"
)
def test_the_library_needs_the_c_library_alone_and_shows_two_functions(installed: Path) -> None:
    path = said(installed, "library()")
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", read_elf(path, "--dynamic"))
    assert {name.split(".")[0] for name in needed} <= {"libc", "libm", "ld-linux-x86-64"}
    symbols = [line.split() for line in read_elf(path, "--dyn-syms").splitlines()]
    shown = {each[7] for each in symbols if len(each) == 8 and each[6].isdigit()}
    assert shown == {"RegisterCustomOps", "edge_memllm_processor"}


@needs_compiler
def test_the_version_is_that_of_the_product(installed: Path) -> None:
    assert said(installed, "__version__") == __version__


def flags_of_the_processor() -> set[str]:
    """As the system tells them, which leaves out what it does not save the registers of."""
    (line, *_) = re.findall(r"^flags\s*:(.*)$", CPUINFO.read_text(), re.MULTILINE) or [""]
    return set(line.split())


@needs_compiler
@pytest.mark.skipif(not CPUINFO.exists(), reason="needs /proc/cpuinfo")
def test_the_processor_is_what_the_system_says(installed: Path) -> None:
    flags, expected = flags_of_the_processor(), ""
    if flags >= {"avx2", "fma", "f16c"}:
        expected = "avx2"
        if flags >= {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"}:
            expected = "avx512-vnni"
    assert said(installed, "processor()") == expected


@needs_compiler
@pytest.mark.parametrize(
    ("limit", "most"), [("none", ""), ("avx2", "avx2"), ("avx512-vnni", "avx512-vnni"), ("", None)]
)
def test_the_environment_lowers_the_processor(
    installed: Path, limit: str, most: str | None
) -> None:
    best = said(installed, "processor()")
    expected = best if most is None else min(best, most, key=NAMES.index)
    assert said(installed, "processor()", EDGE_MEMLLM_KERNELS=limit) == expected


@needs_compiler
def test_a_limit_that_is_no_name_is_refused(installed: Path) -> None:
    say = ("-c", SAY.format("processor()"))
    done = python(*say, folder=installed, check=False, EDGE_MEMLLM_KERNELS="sse4")
    assert "ValueError: EDGE_MEMLLM_KERNELS is 'sse4' in the environment, expected" in done.stderr


def test_sources_that_nobody_compiled_say_so(tmp_path: Path) -> None:
    done = python("-c", SAY.format("library()"), folder=copied(tmp_path), check=False)
    assert re.search(r"FileNotFoundError: .+: the compiled library is not there", done.stderr)


def test_the_source_distribution_holds_what_building_needs(tmp_path: Path) -> None:
    script = f"import backend; backend.build_sdist({str(tmp_path)!r})"
    python("-W", "ignore", "-c", script, folder=copied(tmp_path))
    (made,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(made, tmp_path, filter="data")
    root = tmp_path / made.name.removesuffix(".tar.gz")
    names = {path.relative_to(root).as_posix() for path in root.rglob("*")}
    sources = {f"src/{path.name}" for path in (KERNELS / "src").iterdir()}
    assert names >= sources | {"backend.py", "compiling.py", "setup.py", "LICENSE"}


def test_the_licence_is_that_of_the_product() -> None:
    assert (KERNELS / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def requirements(folder: Path, **environment: str) -> str:
    script = "import backend; print('needs', backend.get_requires_for_build_wheel())"
    return python("-W", "ignore", "-c", script, folder=folder, **environment).stdout


def test_a_compiler_is_fetched_only_where_there_is_none(tmp_path: Path) -> None:
    folder, nowhere = copied(tmp_path), str(tmp_path)
    assert "ziglang>=" in requirements(folder, PATH=nowhere)
    assert "ziglang>=" in requirements(folder, CXX="ziglang")
    assert "ziglang" not in requirements(folder, PATH=nowhere, CXX="my-compiler -m64")


def refused(folder: Path, *arguments: str, **environment: str) -> str:
    done = python("compiling.py", *arguments, folder=folder, check=False, **environment)
    assert done.returncode == 1
    return done.stderr


def test_a_machine_without_a_compiler_is_told_what_to_do(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    (folder / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'ziglang' else find(name, *rest)\n"
    )
    said = refused(folder, PATH=str(tmp_path))
    assert "No C++ compiler: neither CXX in the environment, nor" in said
    assert "pip install ziglang" in said


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("no-such-compiler",), "The compiler no-such-compiler cannot be started: "),
        (
            (sys.executable, "-c", "exit(3)"),
            "The compiler failed with status 3, its messages are above: ",
        ),
    ],
)
def test_a_compiler_that_fails_is_named(
    command: Sequence[str], message: str, tmp_path: Path
) -> None:
    said = refused(copied(tmp_path), str(tmp_path / "out"), CXX=shlex.join(command))
    assert message in said
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.skipif(
    importlib.util.find_spec("ziglang") is None, reason="needs the package ziglang, 100 MB"
)
@pytest.mark.parametrize(
    "target",
    [
        *("x86_64-linux-gnu", "x86_64-linux-musl", "x86_64-macos", "x86_64-windows-gnu"),
        *("aarch64-linux-gnu", "aarch64-macos", "aarch64-windows-gnu"),
    ],
)
def test_the_sources_compile_for_other_systems(
    target: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    caches = str(tmp_path_factory.getbasetemp() / "zig")
    compiler = shlex.join([sys.executable, "-m", "ziglang", "c++", "-target", target])
    environment = {"CXX": compiler, "ZIG_GLOBAL_CACHE_DIR": caches}
    done = python("compiling.py", str(tmp_path / "out"), folder=copied(tmp_path), **environment)
    assert "warning" not in done.stderr
    (library,) = (tmp_path / "out").iterdir()
    assert b"RegisterCustomOps" in library.read_bytes()
