"""Which runtime computes an artifact.

The contract itself is `edge_memllm.runtime_protocol`. Knows no library that computes.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from edge_memllm.engine.request import check_positive
from edge_memllm.errors import RequestError, RuntimeUnavailableError
from edge_memllm.options import DEVICES
from edge_memllm.runtime_protocol import Runtime
from edge_memllm_runtimes.options import RuntimeOptions

if TYPE_CHECKING:
    from edge_memllm.artifact.folder import Artifact


_log = logging.getLogger(__name__)


def usable_devices(artifact: Artifact, device: str = "auto") -> tuple[str, ...]:
    """Return what may compute an artifact, the best first: all for `auto`, else the one named.

    A device may turn out not to work only when the graph is opened on it. Raises
    `RuntimeUnavailableError` when the one named is not there, `RequestError` for another word.
    """
    if device not in DEVICES:
        raise RequestError(f"device is {device!r}, expected one of {', '.join(DEVICES)}.")
    from edge_memllm_runtimes.ort_session import require_device

    if device != "auto":
        require_device(artifact, device)
        return (device,)
    try:
        require_device(artifact, "cuda")
    except RuntimeUnavailableError as error:
        _log.info("device auto: cpu, because cuda is not usable. %s", error)
        return ("cpu",)
    return ("cuda", "cpu")


def open_runtime(
    artifact: Artifact, device: str = "cpu", options: RuntimeOptions | None = None
) -> Runtime:
    """Open ONNX Runtime on "cpu" or "cuda", and nowhere else.

    Raises `RuntimeUnavailableError` when the device is not there, and `RequestError` for an option
    it does not have.
    """
    options = options or RuntimeOptions()
    if options.threads is not None:
        check_positive("threads", options.threads)
    from edge_memllm_runtimes.ort import OrtRuntime

    return OrtRuntime(artifact, device, options)
