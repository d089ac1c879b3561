"""Recorded decode steps on CUDA: which recording a step may replay, and when one is void.

ONNX Runtime records a step on its third run with the same number (run option gpu_graph_id; -1
records nothing) and replays it from then on: the same kernels on the same addresses, whatever is
bound. Between recording and replay the memory a step worked in goes back to the arena. So a
recording is void as soon as anything else may have got some of that memory for good, and numbers
are never used twice. Written from the library's documentation and sources; see docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Hashable
from itertools import count
from typing import Any

from edge_memllm_runtimes.ort_library import import_library

_NO_RECORDING = -1
_RUN_ENTRY = "gpu_graph_id"


class CudaGraphs:
    """The recordings of one session. Not thread-safe: steps take turns."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._numbers = count(1)
        self._recorded: dict[Hashable, tuple[int, Any]] = {}
        self._plain = _run_options(_NO_RECORDING)

    def plain(self) -> Any:
        """Return the run options of a step that is neither recorded nor replayed."""
        return self._plain

    def replayable(self, step: Hashable) -> Any:
        """Return the run options of a step that is recorded, and later replayed, as `step`.

        `step` stands for everything fixed in the recording: buffers, shapes, capacity.
        """
        if step not in self._recorded:
            number = next(self._numbers)
            self._recorded[step] = (number, _run_options(number))
        return self._recorded[step][1]

    def void(self) -> None:
        """Forget every recording: memory of the device was given out for good."""
        for number, _ in self._recorded.values():
            self._session.release_captured_graph(number)
        self._recorded.clear()


def _run_options(number: int) -> Any:
    options = import_library().RunOptions()
    options.add_run_config_entry(_RUN_ENTRY, str(number))
    return options
