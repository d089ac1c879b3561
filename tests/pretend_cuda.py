"""The CUDA path of the runtime on a machine without CUDA: every device is the CPU in truth.

Buffers, bindings, copies and run options are those of CUDA; what computes is the CPU provider.
"""

from __future__ import annotations

from typing import Any

import pytest


def pretend_cuda(patch: pytest.MonkeyPatch) -> list[str]:
    """Let "cuda" stand for the CPU. Returns the list that gpu_graph_id of every run goes into."""
    import onnxruntime
    from onnxruntime.capi import onnxruntime_inference_collection as library

    from edge_memllm_runtimes import cuda_graphs, ort_session

    make, from_numpy = library.OrtDevice.make, library.OrtValue.ortvalue_from_numpy

    def device(name: str, *rest: Any) -> Any:
        return make("cpu" if name == "cuda" else name, *rest)

    def on_host(array: Any, *_: Any) -> Any:
        return from_numpy(array, "cpu", 0)

    entries = ort_session._entries
    ran: list[str] = []
    run = onnxruntime.InferenceSession.run_with_iobinding

    def noted(session: Any, binding: Any, options: Any = None) -> None:
        # The library gives no way to read an entry back; the runtime's own object remembers it.
        ran.append("none" if options is None else numbers[id(options)])
        run(session, binding, options)

    numbers: dict[int, str] = {}
    make_options = cuda_graphs._run_options

    def remembered(number: int) -> Any:
        options = make_options(number)
        numbers[id(options)] = str(number)
        kept.append(options)  # so that an id stands for one object
        return options

    kept: list[Any] = []
    patch.setattr(cuda_graphs, "_run_options", remembered)
    patch.setattr(library.OrtDevice, "make", staticmethod(device))
    patch.setattr(onnxruntime.OrtValue, "ortvalue_from_numpy", staticmethod(on_host))
    patch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", noted)
    patch.setattr(ort_session, "_PROVIDERS", dict.fromkeys(("cpu", "cuda"), "CPUExecutionProvider"))
    patch.setattr(ort_session, "_provider_options", lambda *_: {})
    patch.setattr(ort_session, "_entries", lambda artifact, _: entries(artifact, "cpu"))
    return ran
