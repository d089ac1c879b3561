"""edge-memllm as a contender, through its public API: `load` and `Model.stream`.

The dense baseline goes the same way; its records hold the embedding alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any


class Engine:
    """An artifact; with ``cold`` its table leaves the page cache before every step."""

    def __init__(self, model: Path, threads: int, context: int, cold: bool = False) -> None:
        import edge_memllm

        self._model = edge_memllm.load(model, device="cpu", threads=threads)
        self._pieces: Generator[Any, None, None] | None = None
        self._evict = _evictor(model / self._model.manifest.table.file) if cold else _nothing

    def before_step(self) -> None:
        """Done before each step, off the clock."""
        self._evict()

    def start(self, tokens: list[int], new_tokens: int) -> int:
        """Read the prompt; the first token of the answer."""
        import edge_memllm

        self.finish()
        self._pieces = self._model.stream(
            tokens,
            max_new_tokens=new_tokens,
            sampling=edge_memllm.Sampling(),
            seed=0,
            ignore_eos=True,
        )
        return self.step()

    def step(self) -> int:
        """The next token."""
        assert self._pieces is not None
        return int(next(self._pieces).token)

    def finish(self) -> None:
        """Let go of the last answer."""
        if self._pieces is not None:
            self._pieces.close()
            self._pieces = None

    def logits(self) -> None:
        """Not told by the public API; the export compares them with the checkpoint's."""

    def describe(self) -> dict[str, Any]:
        """What it runs with."""
        return {
            "runtime": self._model.runtime.name,
            "reader": self._model.reader,
            "graph": self._model.manifest.graph.weights,
            "table": self._model.manifest.table.codec,
            "prefill_chunk": self._model.prefill_chunk,
        }


def _evictor(table: Path) -> Callable[[], None]:
    file = os.open(table, os.O_RDONLY)
    os.fsync(file)  # pages that are not yet written cannot be dropped
    return lambda: os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


def _nothing() -> None:
    """What precedes a step with a warm table."""
