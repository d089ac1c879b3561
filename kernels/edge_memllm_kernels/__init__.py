"""Compiled operators for a CPU: where their library is, and what it can use on this processor.

The library is for `onnxruntime.SessionOptions.register_custom_ops_library`. What is here loads no
onnxruntime, and the library itself only when it is asked for the processor.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

__version__ = "0.1.0"  # that of edge-memllm: both are released together

LIMIT_VARIABLE = "EDGE_MEMLLM_KERNELS"
LIBRARY_NAME = {
    "win32": "edge_memllm_kernels.dll",
    "darwin": "libedge_memllm_kernels.dylib",
}.get(sys.platform, "libedge_memllm_kernels.so")

_LIMITS = ("none", "avx2", "avx512-vnni")


def library() -> Path:
    """The shared library with the operators.

    Raises:
        FileNotFoundError: the package is there as sources, which nobody has compiled.
    """
    path = Path(__file__).parent / LIBRARY_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: the compiled library is not there, only the package's sources are. "
            "Install the package, which compiles it: pip install ./kernels, in a clone"
        )
    return path


def processor() -> str:
    """The best instructions that the operators can use on this processor.

    Returns:
        "avx512-vnni" (AVX-512 F, BW, VL, DQ and VNNI), "avx2" (AVX2, FMA and F16C), or "" for
        nothing: there are no operators for this processor. Never more than the environment
        variable EDGE_MEMLLM_KERNELS allows, "avx2" or "none"; it is best set before Python starts.

    Raises:
        ValueError: that variable has another value.
        FileNotFoundError: as of `library`.
    """
    limit = os.environ.get(LIMIT_VARIABLE, "")
    if limit and limit not in _LIMITS:
        raise ValueError(
            f"{LIMIT_VARIABLE} is {limit!r} in the environment, expected one of "
            f"{', '.join(_LIMITS)}. Without the variable the best is taken"
        )
    if limit == "none":
        return ""
    ask = ctypes.CDLL(str(library())).edge_memllm_processor
    ask.restype = ctypes.c_char_p
    name: bytes = ask()
    return name.decode()
