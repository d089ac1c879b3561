"""Runtimes: what turns the records of a step into logits.

`open_runtime` gives ONNX Runtime on CPU or CUDA, `usable_devices` says which of them to try.
`torch_reference` is the judge that tests and the exporter compare with; `fake` stands in where no
graph is needed. Importing this package imports none of their libraries.
"""

from __future__ import annotations

from edge_memllm.runtime_protocol import KVCache, Runtime
from edge_memllm_runtimes.runtime import open_runtime, usable_devices

__all__ = ["KVCache", "Runtime", "open_runtime", "usable_devices"]
