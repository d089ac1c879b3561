"""Kernels of our own for a CPU: the package edge-memllm-kernels, where it is installed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edge_memllm.errors import EdgeMemLLMError
from edge_memllm_runtimes.cpu_graph import INPUT_BITS
from edge_memllm_runtimes.options import RuntimeOptions

# With AVX2 alone, the library is the quicker one where inputs may be rounded to 8 bits.
_INPUT_BITS = {"avx2": (15,)}


@dataclass(frozen=True, slots=True)
class OwnKernels:
    """A library of operators that this processor can use."""

    library: Path
    name: str  # the package, its version, and what it uses of the processor
    input_bits: tuple[int, ...] = INPUT_BITS  # of products that they compute: see `cpu_graph`


def installed_kernels() -> OwnKernels | None:
    """Return what is installed and can be used on this processor, if anything is.

    Raises `EdgeMemLLMError` for a package without its library, and for an environment that asks
    for kernels that do not exist.
    """
    try:
        import edge_memllm_kernels as package
    except ImportError:
        return None
    try:
        processor = package.processor()
        if not processor:
            return None
        library = package.library()
    except (OSError, ValueError) as error:
        raise EdgeMemLLMError(f"edge-memllm-kernels: {error}.") from error
    name = f"edge-memllm-kernels {package.__version__} ({processor})"
    return OwnKernels(library, name, _INPUT_BITS.get(processor, INPUT_BITS))


def kernels_for(device: str, dtype: str, options: RuntimeOptions) -> OwnKernels | None:
    """Return the kernels that compute a graph: on a CPU, in float32, unless they are refused."""
    if device != "cpu" or dtype != "float32" or not options.own_kernels:
        return None
    return installed_kernels()
