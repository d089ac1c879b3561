"""What others notice while long prompts arrive: pauses of a stream, waiting for /health, memory.

    python -m benchmarks.over_http.long_prompts ARTIFACT
        [--bytes 2000000] [--at-once 4] [--json FILE]

Starts `edge-memllm serve`. One client streams replies, another asks for /health, each on a
connection of its own; meanwhile so many long requests come at once, of one kind after the other.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from http.client import HTTPConnection
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import httpx
import psutil

from benchmarks.over_http.program import PATIENCE, Most, serving

COLUMNS = (
    *("requests", "answers", "answered after, s", "longest pause of a stream, s"),
    *("slowest /health, s", "more memory, MB"),
)
_WORDS = "The river was wide and slow, and nobody in the village had ever seen its other side. "
_WHILE = 1.0  # seconds before and after


@dataclass(frozen=True)
class Found:
    """What was seen while requests of one kind came. Seconds."""

    kind: str
    statuses: list[int]
    answered: float  # the last of them
    pause: float
    health: float
    more_bytes: int  # of memory that is nobody else's, at its most


def kinds(size: int) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield requests of about `size` bytes: what they are, their path and their body."""
    words = (_WORDS * (size // len(_WORDS) + 1))[:size]
    yield "none that is long", "/tokenize", {"prompt": _WORDS}
    yield "words", "/v1/completions", {"prompt": words}
    yield "one word", "/v1/completions", {"prompt": "a" * size}
    yield "spaces", "/v1/completions", {"prompt": " " * size}
    yield "token ids", "/v1/completions", {"prompt": [1] * (size // 3)}
    yield "a list of prompts", "/v1/completions", {"prompt": [words[: size // 16]] * 16}
    yield "a chat", "/v1/chat/completions", {"messages": [{"role": "user", "content": words}]}
    yield "to /tokenize", "/tokenize", {"prompt": words}
    yield "what /tokenize takes", "/tokenize", {"prompt": words[: 256 << 10]}
    yield "to /detokenize", "/detokenize", {"tokens": [1] * (size // 3)}


def pauses(url: str) -> Iterator[float]:
    """Stream a reply; yield the seconds between its parts."""
    body = {"prompt": _WORDS, "max_tokens": 400, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=PATIENCE) as response:
        last = perf_counter()
        for _ in response.iter_raw():
            yield perf_counter() - last
            last = perf_counter()


def health(url: str) -> float:
    """Ask for /health on a new connection; return the seconds that it took."""
    start = perf_counter()
    connection = HTTPConnection(url.removeprefix("http://"), timeout=PATIENCE)
    connection.request("GET", "/health")
    connection.getresponse().read()
    found = perf_counter() - start
    connection.close()
    return found


def memory(process: psutil.Process) -> int:
    """Return the bytes in memory that no other process shares."""
    found = process.memory_info()
    return int(found.rss - found.shared)


def measure(
    url: str, process: psutil.Process, kind: tuple[str, str, dict[str, Any]], at_once: int
) -> Found:
    """Let so many requests of one kind come at once."""
    name, path, body = kind
    content = json.dumps(body).encode()

    def send(_: int) -> tuple[int, float]:
        start = perf_counter()
        connection = HTTPConnection(url.removeprefix("http://"), timeout=PATIENCE)
        connection.request("POST", path, content, {"content-type": "application/json"})
        status = connection.getresponse().status
        connection.close()
        return status, perf_counter() - start

    before = memory(process)
    with (
        Most(lambda: max(pauses(url)), seconds=0) as paused,
        Most(lambda: health(url), seconds=0.02) as healthy,
        Most(lambda: memory(process)) as grown,
        ThreadPoolExecutor(at_once) as pool,
    ):
        sleep(_WHILE)
        answers = list(pool.map(send, range(at_once)))
        sleep(_WHILE)
    return Found(
        kind=name,
        statuses=[status for status, _ in answers],
        answered=max(seconds for _, seconds in answers),
        pause=paused.value,
        health=healthy.value,
        more_bytes=grown.value - before,
    )


def show(found: Sequence[Found]) -> None:
    """Print what was found as a table."""
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
    for each in found:
        print(
            f"| {each.kind} | {', '.join(map(str, sorted(set(each.statuses))))} "
            f"| {each.answered:.2f} | {each.pause:.2f} | {each.health:.2f} "
            f"| {each.more_bytes / 1e6:.0f} |"
        )


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], epilog="Other options go to the server."
    )
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--bytes", type=int, default=2_000_000, help="of a request")
    parser.add_argument("--at-once", type=int, default=4)
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_known_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    wish, words = parse(arguments)
    with serving([wish.artifact], words) as program:
        url, process = program.url, psutil.Process(program.pid)
        list(pauses(url))  # what is made once is made here
        found = [measure(url, process, kind, wish.at_once) for kind in kinds(wish.bytes)]
    show(found)
    if wish.json is not None:
        report = {"bytes": wish.bytes, "at_once": wish.at_once, "found": list(map(asdict, found))}
        wish.json.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
