"""The other end of `worker`: a contender as an object that answers runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from contenders import Contender

_WORKER = Path(__file__).with_name("worker.py")


class Worker:
    """A running worker. Use it as a context manager: its process ends with it."""

    def __init__(self, contender: Contender, model: Path, threads: int, context: int) -> None:
        """Start the process and wait until it has loaded; ``loaded`` is what it said then."""
        self.contender = contender
        specification = {
            "engine": contender.engine,
            "model": str(model),
            "threads": threads,
            "context": context,
            "settings": contender.settings,
        }
        # The name is for people who look at the list of processes.
        command = [sys.executable, str(_WORKER), contender.name, json.dumps(specification)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.loaded = self._answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def run(self, prompt: list[int], steps: int, **logits: str) -> dict[str, Any]:
        """Read ``prompt`` and decode ``steps`` tokens more than the first."""
        assert self._process.stdin is not None
        asked = {"prompt": prompt, "steps": steps, **logits}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.contender.name}: its process ended; it said why above.")
        answer: dict[str, Any] = json.loads(line)
        return answer
