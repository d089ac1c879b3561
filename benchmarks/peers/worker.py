"""One contender in a process of its own, driven by lines of JSON on standard input.

    python worker.py NAME SPECIFICATION

SPECIFICATION is JSON: engine, model, threads, context, settings. The worker says what loading
took, then does one run per line it gets and says what that took, until its input ends. Between
runs it waits in a read and computes nothing; it reports the processor time spent there.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from time import perf_counter, process_time
from typing import IO, Any

from quiet import busy_seconds

_STATUS_KEYS = {"VmHWM": "peak_rss_bytes", "RssAnon": "anon_bytes", "RssFile": "file_bytes"}


def main(specification: str) -> int:
    asked = json.loads(specification)
    answers = _own_stdout()
    start = perf_counter()
    module = importlib.import_module(asked["engine"])
    engine = module.Engine(
        Path(asked["model"]), asked["threads"], asked["context"], **asked["settings"]
    )
    loaded = {"load_seconds": perf_counter() - start, **memory(), "settings": engine.describe()}
    _say(answers, loaded)
    idle_since = process_time()
    for line in sys.stdin:
        idle = process_time() - idle_since
        _say(answers, {**_run(engine, json.loads(line)), "idle_cpu_seconds": idle})
        idle_since = process_time()
    return 0


def _run(engine: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """Read a prompt, then decode; each step timed alone. The first token belongs to the prompt."""
    prompt, steps = asked["prompt"], asked["steps"]
    before = perf_counter(), busy_seconds(), process_time()
    engine.before_step()
    start = perf_counter()
    tokens = [engine.start(prompt, steps + 1)]
    prefill = perf_counter() - start
    _keep(engine, asked.get("first_logits"))
    seconds = []
    for _ in range(steps):
        engine.before_step()
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


def _keep(engine: Any, path: str | None) -> None:
    """Write the logits of the last position, for engines that tell them."""
    import numpy as np

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


if __name__ == "__main__":
    sys.exit(main(sys.argv[2]))
