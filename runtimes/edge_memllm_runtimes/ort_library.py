"""The one door through which onnxruntime is imported: it reports nothing to anybody.

Since 1.31 the library writes a device id and events into the user's cache folder as soon as it is
imported, and sends them to its maker some seconds later. `disable_telemetry_events` is too late
for the first, so the environment has to say no before the import.
"""

from __future__ import annotations

import os
from typing import Any

from edge_memllm.errors import RuntimeUnavailableError, how_to_install

_VARIABLE = "ORT_DISABLE_TELEMETRY"


def import_library() -> Any:
    """Return the module onnxruntime, its telemetry off unless the environment has decided.

    Raises `RuntimeUnavailableError` without it.
    """
    undecided = _VARIABLE not in os.environ
    if undecided:
        os.environ[_VARIABLE] = "1"
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"This needs the package 'onnxruntime', which cannot be imported ({error}). "
            f"{how_to_install()}"
        ) from error
    if undecided:  # the program around us may have imported it before
        onnxruntime.disable_telemetry_events()
    return onnxruntime
