"""A server as a program of its own, what it tells of itself, and the memory of its process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from time import monotonic, sleep
from typing import Any, Self

import httpx

from edge_memllm.statistics import ProcessMemory, parse_proc_status

PATIENCE = 300.0  # seconds for one answer, on a machine that does other work
_SAMPLE = re.compile(r"^edge_memllm_(\w+) (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Program:
    """A server that runs."""

    url: str
    pid: int

    def get(self, path: str) -> httpx.Response:
        """Ask for something that must be there."""
        return httpx.get(self.url + path, timeout=PATIENCE, verify=False).raise_for_status()

    def metrics(self) -> dict[str, float]:
        """Return what `/metrics` has, without samples that have labels."""
        return {name: float(value) for name, value in _SAMPLE.findall(self.get("/metrics").text)}

    def states(self) -> dict[str, str]:
        """Return the state of each model."""
        return {each["id"]: each["state"] for each in self.get("/v1/models").json()["data"]}

    def memory(self) -> ProcessMemory:
        """Return the memory of the process, on Linux."""
        return parse_proc_status(self._proc("status").read_text(encoding="ascii"))

    def threads(self) -> int:
        """Return how many threads it has, on Linux."""
        return len(os.listdir(self._proc("task")))

    def open_files(self) -> int:
        """Return how many descriptors it has, on Linux."""
        return len(os.listdir(self._proc("fd")))

    def settle(self) -> dict[str, float]:
        """Wait until nothing is under way; return the metrics then."""
        limit = monotonic() + PATIENCE
        while True:
            found = self.metrics()
            busy = (found["slots_busy"], found["queued"], found["http_requests_under_way"] - 1)
            if not any(busy):
                return found
            if monotonic() > limit:
                raise TimeoutError(f"texts, queued texts and requests under way: {busy}")
            sleep(0.02)

    def _proc(self, name: str) -> Path:
        return Path(f"/proc/{self.pid}/{name}")


@contextmanager
def serving(artifacts: Sequence[Path], words: Sequence[str] = ()) -> Iterator[Program]:
    """Start `edge-memllm serve` on a free port; it is ended behind the context."""
    command = [sys.executable, "-m", "edge_memllm", "serve", *map(str, artifacts)]
    with subprocess.Popen(
        [*command, "--port", "0", "--json", *words], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            lines: list[str] = []
            while not lines or lines[-1] != "}\n":
                lines.append(process.stdout.readline())
                if not lines[-1]:
                    raise RuntimeError("the server ended before it listened; it says why above")
            found = Program(json.loads("".join(lines))["url"], process.pid)
            _await_answer(found)
            yield found
        finally:
            process.terminate()


def _await_answer(program: Program) -> None:
    limit = monotonic() + PATIENCE
    while True:
        try:
            program.get("/health")
        except httpx.ConnectError:
            if monotonic() > limit:
                raise
            sleep(0.02)
        else:
            return


class Most:
    """The largest value of something that is looked at again and again in a thread."""

    def __init__(self, look: Any, seconds: float = 0.01) -> None:
        self._look, self._seconds = look, seconds
        self._ended = Event()
        self._thread = Thread(target=self._run)
        self.value = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self.value = max(self.value, self._look())
            if self._ended.wait(self._seconds):
                return
