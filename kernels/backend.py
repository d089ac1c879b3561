"""setuptools, which asks for the package ziglang too where the machine has no compiler."""

from __future__ import annotations

from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 - the hooks that are as they were

from compiling import system_compiler

# 100 MB. Those before refuse AVX-512 to functions when the baseline has none (LLVM's evex512).
ZIGLANG = "ziglang>=0.17,<0.18"


def _with_a_compiler(requirements: list[str]) -> list[str]:
    return requirements if system_compiler() is not None else [*requirements, ZIGLANG]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """What building a wheel needs."""
    return _with_a_compiler(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """What an installation needs that stays where it is."""
    return _with_a_compiler(build_meta.get_requires_for_build_editable(config_settings))
