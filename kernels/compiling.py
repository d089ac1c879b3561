"""Which compiler makes the library, and how. Asks for nothing but Python.

python compiling.py             says which compiler would be taken; fails where there is none
python compiling.py FOLDER      compiles the library into it
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from edge_memllm_kernels import LIBRARY_NAME

HERE = Path(__file__).parent
ZIG = [sys.executable, "-m", "ziglang", "c++"]

# No -march: functions name their instructions themselves, and the processor is asked at run time.
# Without C++'s library in both its halves, so that nothing but the system's C library is needed.
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden"),
    *("-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics", "-nostdinc++"),
    # A multiplication and an addition stay two: else a row's result depended on those beside it.
    "-ffp-contract=off",
    *("-Wall", "-Wextra"),
    # gcc before 13 finds fault with its own headers of intrinsics; clang lacks one of these.
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"),
)


class CompilerError(Exception):
    """There is no compiler, or it did not compile."""


def system_compiler() -> list[str] | None:
    """That of the environment variable CXX, or one of this machine that answers.

    None stands for the package ziglang, which CXX may ask for as well.
    """
    chosen = os.environ.get("CXX", "")
    if chosen and chosen != "ziglang":
        return shlex.split(chosen)
    if chosen or sys.platform == "win32":
        # MinGW's gcc does not align the stack for wide registers: what it makes would crash.
        return None
    found = (shutil.which(name) for name in ("c++", "g++", "clang++"))
    return next(([path] for path in found if path is not None and answers(path)), None)


def answers(compiler: str) -> bool:
    """False for what only offers to install a compiler, as on macOS."""
    asked = subprocess.run([compiler, "--version"], capture_output=True, check=False)
    return asked.returncode == 0


def compiler() -> list[str]:
    """The command of the compiler that is taken.

    Raises:
        CompilerError: there is none.
    """
    if (command := system_compiler()) is not None:
        return command
    if importlib.util.find_spec("ziglang") is not None:
        return ZIG
    raise CompilerError(
        "No C++ compiler: neither CXX in the environment, nor c++, g++ or clang++ on the PATH "
        "(none of them is taken on Windows), nor the package ziglang: pip install ziglang"
    )


def own_flags(command: Sequence[str]) -> tuple[list[str], list[str]]:
    """What one compiler wants besides `FLAGS`: for compiling, and for linking."""
    if any("zig" in Path(part).stem for part in command):
        # Left alone it compiles for this very processor, and builds libc++, for a minute.
        return ["-mcpu=baseline", "-g0"], ["-mcpu=baseline", "-g0", "-nostdlib++"]
    return [], ["-nostdlib++" if sys.platform == "darwin" else "-Wl,--as-needed"]


def sources() -> list[Path]:
    """Every file that is compiled."""
    return sorted((HERE / "src").glob("*.cpp"))


def compile_library(folder: Path) -> Path:
    """Compile the library into a folder.

    Raises:
        CompilerError: there is no compiler, or it failed; its messages were shown.
    """
    command = compiler()
    print(f"edge-memllm-kernels: compiling {LIBRARY_NAME} with {shlex.join(command)}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    # Aside: some compilers leave more than a library, and one that is in use is not written on.
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        made = linked(command, Path(aside))
        return made.replace(folder / LIBRARY_NAME)


def linked(command: Sequence[str], aside: Path) -> Path:
    """The library, and in the same folder what it is made of."""
    compiling, linking = own_flags(command)
    objects = [str(aside / f"{path.stem}.o") for path in sources()]

    def compile_one(source: Path, made: str) -> None:
        run([*command, *FLAGS, *compiling, "-c", str(source), "-o", made], aside)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(compile_one, sources(), objects))
    library = aside / LIBRARY_NAME
    run([*command, "-shared", *linking, *objects, "-o", str(library)], aside)
    return library


def run(words: Sequence[str], caches: Path) -> None:
    """Let the compiler work.

    Raises:
        CompilerError: it cannot be started, or it failed.
    """
    own = {"ZIG_GLOBAL_CACHE_DIR": str(caches), "ZIG_LOCAL_CACHE_DIR": str(caches)}
    try:
        status = subprocess.run(words, env={**own, **os.environ}, check=False).returncode
    except OSError as error:
        raise CompilerError(f"The compiler {words[0]} cannot be started: {error}") from error
    if status != 0:
        raise CompilerError(
            f"The compiler failed with status {status}, its messages are above: "
            f"{shlex.join(words)}\nAnother one is taken if the environment variable CXX names it; "
            "CXX=ziglang stands for the package of that name"
        )


def main(arguments: Sequence[str]) -> int:
    """Say which compiler is taken, or compile."""
    try:
        print(compile_library(Path(arguments[0])) if arguments else shlex.join(compiler()))
    except CompilerError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
