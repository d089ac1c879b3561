"""A wheel for all Pythons with a plain shared library in it; pyproject.toml has the rest."""

from __future__ import annotations

import platform
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

from compiling import CompilerError, compile_library, sources
from edge_memllm_kernels import LIBRARY_NAME

PACKAGE = "edge_memllm_kernels"


class BuildLibrary(Command):
    """Compile the library beside the package's Python files."""

    build_lib: str | None = None
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self) -> None:
        try:
            compile_library(Path(self._folder()))
        except CompilerError as error:
            raise SystemExit(f"edge-memllm-kernels: {error}") from error

    def _folder(self) -> str:
        return PACKAGE if self.editable_mode else f"{self.build_lib}/{PACKAGE}"

    def get_source_files(self) -> list[str]:
        return [path.relative_to(Path.cwd()).as_posix() for path in sources()]

    def get_outputs(self) -> list[str]:
        return [f"{self._folder()}/{LIBRARY_NAME}"]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):
    sub_commands = (*build.sub_commands, ("build_library", None))


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        # A Python of two processors in one file still has a compiler that makes it for one.
        return "py3", "none", super().get_tag()[2].replace("universal2", platform.machine())


class Platform(Distribution):
    def has_ext_modules(self) -> bool:
        """The wheel is for one platform, although nothing in it is an extension of Python."""
        return True


setup(
    distclass=Platform,
    cmdclass={"build": Build, "build_library": BuildLibrary, "bdist_wheel": Wheel},
)
