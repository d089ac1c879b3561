"""One contender in a process of its own, driven by lines of JSON on standard input: both ends.

    python -m benchmarks.peers.worker NAME SPECIFICATION

SPECIFICATION is JSON: engine, model, threads, context, settings. The worker says what loading
took, then does one run per line it gets and says what that took, until its input ends. Between
runs it waits in a read and computes nothing; it reports the processor time spent there. Linux
only: how busy the machine is, and memory, are read from /proc.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from threading import Timer
from time import monotonic, perf_counter, process_time, sleep
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from benchmarks.peers.contenders import Contender
from benchmarks.peers.engines import ENGINES, Engine

_MODULE = "benchmarks.peers.worker"
_ENTER = 'echo $$ > "$1"; shift; exec "$@"'
_LOOK_SECONDS = 0.3
_STATUS_KEYS = {"VmHWM": "peak_rss_bytes", "RssAnon": "anon_bytes", "RssFile": "file_bytes"}


class Worker:
    """A running worker. Use it as a context manager: its process ends with it."""

    def __init__(
        self,
        contender: Contender,
        model: Path,
        threads: int,
        context: int,
        group: Path | None = None,
        most_seconds: float | None = None,
    ) -> None:
        """Start the process and wait until it has loaded; ``loaded`` is what it said then.

        ``group`` is the folder of a control group that it starts in; after ``most_seconds`` it is
        killed.
        """
        self.contender = contender
        specification = {
            "engine": contender.engine,
            "model": str(model),
            "threads": threads,
            "context": context,
            "settings": contender.settings,
        }
        # The name is for people who look at the list of processes.
        command = [sys.executable, "-m", _MODULE, contender.name, json.dumps(specification)]
        if group is not None:
            command = ["sh", "-c", _ENTER, "sh", str(group / "cgroup.procs"), *command]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._end = Timer(most_seconds or 0, self._process.kill)
        if most_seconds:
            self._end.start()
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
        with suppress(BrokenPipeError):  # of one that was killed
            self._process.stdin.close()
        self._process.wait()
        self._end.cancel()

    def run(
        self, prompt: list[int], steps: int, *, cold: bool = True, **logits: str
    ) -> dict[str, Any]:
        """Read ``prompt`` and decode ``steps`` tokens more than the first.

        ``cold`` false leaves the table of a contender in the page cache that is cold otherwise.
        """
        assert self._process.stdin is not None
        asked = {"prompt": prompt, "steps": steps, "cold": cold, **logits}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._end.cancel()
            raise RuntimeError(f"{self.contender.name}: its process ended; it said why above.")
        answer: dict[str, Any] = json.loads(line)
        return answer


def main(specification: str) -> int:
    """Answer runs of the contender that a specification (JSON) tells of, until input ends."""
    asked = json.loads(specification)
    answers = _own_stdout()
    start = perf_counter()
    make = ENGINES[asked["engine"]]
    engine = make(Path(asked["model"]), asked["threads"], asked["context"], **asked["settings"])
    loaded = {"load_seconds": perf_counter() - start, **memory(), "settings": engine.describe()}
    _say(answers, loaded)
    idle_since = process_time()
    for line in sys.stdin:
        idle = process_time() - idle_since
        _say(answers, {**_run(engine, json.loads(line)), "idle_cpu_seconds": idle})
        idle_since = process_time()
    return 0


def _run(engine: Engine, asked: dict[str, Any]) -> dict[str, Any]:
    """Read a prompt, then decode; each step timed alone. The first token belongs to the prompt."""
    prompt, steps = asked["prompt"], asked["steps"]
    before_step = engine.before_step if asked.get("cold", True) else _nothing
    before = perf_counter(), busy_seconds(), process_time()
    before_step()
    start = perf_counter()
    tokens = [engine.start(prompt, steps + 1)]
    prefill = perf_counter() - start
    _keep(engine, asked.get("first_logits"))
    seconds = []
    for _ in range(steps):
        before_step()
        start = perf_counter()
        tokens.append(engine.step())
        seconds.append(perf_counter() - start)
    _keep(engine, asked.get("last_logits"))
    elapsed, busy, own = (
        now - then
        for now, then in zip((perf_counter(), busy_seconds(), process_time()), before, strict=True)
    )
    used = memory()
    engine.finish()
    return {
        "prefill_seconds": prefill,
        "step_seconds": seconds,
        "tokens": tokens,
        "taken_by_others": max(0.0, busy - own) / (elapsed * (os.cpu_count() or 1)),
        **used,
    }


def _nothing() -> None:
    """What precedes the steps of a run that is warm."""


def _keep(engine: Engine, path: str | None) -> None:
    """Write the logits of the last position, for engines that tell them."""
    if path is None:
        return
    logits = engine.logits()
    if logits is not None:
        np.save(path, logits, allow_pickle=False)


def memory() -> dict[str, int]:
    """Resident memory of this process now, and the most it ever was."""
    found = {}
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        key, _, value = line.partition(":")
        if key in _STATUS_KEYS:
            found[_STATUS_KEYS[key]] = int(value.split()[0]) * 1024
    return found


def _own_stdout() -> IO[str]:
    """Standard output for our answers alone: what a library prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def _say(answers: IO[str], what: dict[str, Any]) -> None:
    answers.write(json.dumps(what) + "\n")
    answers.flush()


def busy_seconds() -> float:
    """Processor time that the whole machine has spent so far on anything but waiting."""
    fields = Path("/proc/stat").read_text("ascii").split("\n", 1)[0].split()[1:9]
    user, nice, system, _, _, *rest = (int(each) for each in fields)
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def wait_for_quiet(most: float, patience: float) -> None:
    """Sleep until no more than the share ``most`` of the processors is busy, or patience ends."""
    end = monotonic() + patience
    while _share() > most and monotonic() < end:
        pass


def _share() -> float:
    start, busy = monotonic(), busy_seconds()
    sleep(_LOOK_SECONDS)
    return (busy_seconds() - busy) / ((monotonic() - start) * (os.cpu_count() or 1))


if __name__ == "__main__":
    sys.exit(main(sys.argv[2]))
