"""One process that opens mutants, one after the other, and says what came of each.

Everything heavy is imported once, and a good artifact is used first: what memory and descriptors
are taken beyond that is a mutant's doing. Prints one line of JSON for each mutant.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.fuzz.artifact import Files, read_files
from benchmarks.fuzz.mutants import make_mutant
from edge_memllm import load
from edge_memllm.errors import EdgeMemLLMError, RequestError

MOST_BYTES = 1 << 30
_PIPE = os.dup(1)
_PROMPTS = ("The old mill", "river")
_CHAT = [{"role": "user", "content": "Who sleeps?"}]


def answers(folder: Path) -> list[str]:
    """Load, continue two texts, and render a chat."""
    with load(folder, device="cpu", reader="pread", threads=1) as model:
        found = [model.generate(each, max_new_tokens=4, seed=1) for each in _PROMPTS]
        template = model.tokenizer.chat_template
        if template is not None:
            try:
                found.append(template.render(_CHAT))
            except RequestError as error:  # a bad template ends chat, nothing else
                found.append(f"{type(error).__name__}")
        return found


class Folder:
    """The artifact on disk; only what a mutant changes is written, and put right afterwards."""

    def __init__(self, path: Path, base: Files) -> None:
        self._path = path
        self._base = base
        self._changed: set[str] = set(base)
        self.put(base)

    def put(self, files: Files) -> None:
        """Make the folder hold `files`."""
        changed = {name for name in files if files[name] is not self._base[name]}
        for name in self._changed | changed:
            (self._path / name).write_bytes(files[name])
        self._changed = changed


def outcome(folder: Path, expected: list[str]) -> tuple[str, str]:
    """Open what lies in the folder; return what came of it, and of what kind that was."""
    try:
        found = answers(folder)
    except EdgeMemLLMError as error:
        return "refused", f"{type(error).__name__}: {str(error)[:300]}"
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # panics of Rust are no Exception
        return "untyped", f"{type(error).__module__}.{type(error).__name__}: {str(error)[:300]}"
    return ("same", "") if found == expected else ("different", str(found)[:200])


def work(source: Path, folder: Path, seed: int, numbers: range) -> None:
    """Open the mutants of these numbers of the artifact at `source`, in `folder`."""
    base = read_files(source)
    disk = Folder(folder, base)
    expected = answers(folder)
    assert answers(folder) == expected
    descriptors = len(os.listdir("/proc/self/fd"))
    limit = _bytes("/proc/self/status", "VmSize") + MOST_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _say({"ready": True})
    for number in numbers:
        mutant = make_mutant(base, seed, number)
        disk.put(mutant.files)
        before = _forget_peak()
        start = time.perf_counter()
        what, why = outcome(folder, expected)
        seconds = time.perf_counter() - start
        grown = _bytes("/proc/self/status", "VmHWM") - before
        if grown > MOST_BYTES:
            what, why = "memory", f"{grown:,} bytes; {what} {why}"
        if len(os.listdir("/proc/self/fd")) > descriptors + 1:
            what, why = "leak", f"{what} {why}"
        _say(
            {
                "number": number,
                "file": mutant.name,
                "how": mutant.how,
                "rewritten": mutant.rewritten,
                "what": what,
                "why": why,
                "seconds": round(seconds, 3),
            }
        )


def _bytes(path: str, name: str) -> int:
    with open(path, encoding="ascii", errors="replace") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def _forget_peak() -> int:
    """Make the resident memory of now its own peak; return it."""
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")
    return _bytes("/proc/self/status", "VmRSS")


def _say(line: dict[str, Any]) -> None:
    os.write(_PIPE, (json.dumps(line) + "\n").encode())


if __name__ == "__main__":
    os.dup2(2, 1)  # what libraries print is no answer
    source, folder, seed, start, stop = sys.argv[1:]
    work(Path(source), Path(folder), int(seed), range(int(start), int(stop)))
