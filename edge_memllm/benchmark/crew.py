"""The parent's side of the workers: starting them, asking them, and ending them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self

from edge_memllm import errors
from edge_memllm.benchmark.plan import Plan, Variant
from edge_memllm.errors import EdgeMemLLMError

_COMMAND = [sys.executable, "-m", "edge_memllm.benchmark.worker"]
_KILLED = -9
_PATIENCE = 10.0  # seconds for a worker to end by itself


class Worker:
    """One process with one variant loaded. Use it as a context manager: leaving ends it."""

    def __init__(self, variant: Variant, plan: Plan) -> None:
        """Start the process and wait until the variant is loaded. Raises what loading raises."""
        self.variant = variant
        self._process = subprocess.Popen(
            _COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )
        try:
            self.description: dict[str, Any] = self._exchange(
                {"variant": variant.as_dict(), "plan": asdict(plan)}
            )
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end(at_once=kind is not None)

    @property
    def threads(self) -> int:
        """Threads that compute the graph."""
        from edge_memllm_runtimes.processors import physical_cores

        return int(self.variant.settings.get("threads") or physical_cores())

    def ask(self, command: str, **values: Any) -> Any:
        """Have the process do something, and return what comes of it. Raises what it raises."""
        return self._exchange({"command": command, **values})

    def _exchange(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise self._died()
        reply = json.loads(line)
        if "error" in reply:
            raise getattr(errors, reply["error"])(reply["message"])
        return reply["done"]

    def _died(self) -> EdgeMemLLMError:
        code = self._process.wait()
        if code == _KILLED:
            reason = "Memory may have run out: all variants are loaded together, measure fewer."
        else:
            reason = "It said why above."
        return EdgeMemLLMError(
            f"The process that measures '{self.variant.name}' ended with code {code}. {reason}"
        )

    def _end(self, *, at_once: bool = True) -> None:
        if at_once:
            self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                continue
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def start_workers(variants: Sequence[Variant], plan: Plan, opened: ExitStack) -> list[Worker]:
    """Start one worker per variant, one after the other, so that none disturbs loading."""
    return [opened.enter_context(Worker(variant, plan)) for variant in variants]
