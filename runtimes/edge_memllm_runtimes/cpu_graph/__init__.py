"""The graph of an artifact as a CPU computes it fastest; what it computes stays the same.

An artifact holds one graph for every device. It computes in float16, which accelerators want; a CPU
converts to float32 in nearly every operator and back behind it. So what was checked is rewritten
before ONNX Runtime sees it: float32 between operators; of keys and values that several layers read
no more than they look at; and prompts over int8 keys and values in float32.
"""

from edge_memllm_runtimes.cpu_graph.kernels import INPUT_BITS
from edge_memllm_runtimes.cpu_graph.rewriting import (
    FLOATS_FILE,
    CpuGraph,
    computed_dtype,
    floats_of,
    for_cpu,
)

__all__ = ["FLOATS_FILE", "INPUT_BITS", "CpuGraph", "computed_dtype", "floats_of", "for_cpu"]
