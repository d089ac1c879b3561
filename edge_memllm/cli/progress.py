"""Progress of long work on stderr: one bar per stage, with the time left."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from tqdm import tqdm


class StageBars:
    """Callable as ``bars(stage, done, total)``: starts a bar for each new stage."""

    def __init__(self) -> None:
        self._stage = ""
        self._bar: tqdm[None] | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` steps of ``stage`` are done."""
        if self._bar is None or stage != self._stage:
            self._start(stage, total)
        assert self._bar is not None
        self._bar.update(done - self._bar.n)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()

    def _start(self, stage: str, total: int) -> None:
        from tqdm import tqdm

        self._close()
        self._stage = stage
        # Work that is done at once shows no bar.
        self._bar = tqdm(
            total=total,
            desc=f"{stage:<8}",
            file=sys.stderr,
            dynamic_ncols=True,
            delay=0.5,
            disable=None,  # nothing but a terminal shows a bar
        )

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
