"""Which runtime computes an artifact.

The contract itself is `edge_memllm.runtime_protocol`. Knows no library that computes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from edge_memllm.errors import RequestError, RuntimeUnavailableError
from edge_memllm.options import DEVICES
from edge_memllm.request import check_positive
from edge_memllm.runtime_protocol import Runtime
from edge_memllm_runtimes.options import RuntimeOptions

if TYPE_CHECKING:
    from edge_memllm.artifact.folder import Artifact


_log = logging.getLogger(__name__)


def open_runtime(
    artifact: Artifact,
    device: str = "auto",
    threads: int | None = None,
    options: Callable[[str], RuntimeOptions] | None = None,
) -> Runtime:
    """Open ONNX Runtime on the device asked for; `auto` takes CUDA where it really works.

    `threads` is for the CPU: None takes one per physical core. `options` gives the rest for the
    device that is tried, "cpu" or "cuda"; it may refuse. The runtime's `device` says what was
    chosen. Raises `RuntimeUnavailableError` when the device is not there, never falls back from
    one that was named, and `RequestError` for an option the device does not have.
    """
    if device not in DEVICES:
        raise RequestError(f"device is {device!r}, expected one of {', '.join(DEVICES)}.")
    if threads is not None:
        check_positive("threads", threads)
    from edge_memllm_runtimes.ort import OrtRuntime
    from edge_memllm_runtimes.ort_session import require_device

    def opened(name: str) -> Runtime:
        require_device(artifact, name)
        chosen = RuntimeOptions() if options is None else options(name)
        return OrtRuntime(artifact, name, replace(chosen, threads=threads))

    if device != "auto":
        return opened(device)
    try:
        return opened("cuda")
    except RuntimeUnavailableError as error:
        _log.info("device auto: cpu, because cuda is not usable. %s", error)
    return opened("cpu")
