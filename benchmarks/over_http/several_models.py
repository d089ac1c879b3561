"""Several models under one memory limit: requests of all protocols at once, and what they cost.

    python -m benchmarks.over_http.several_models ARTIFACT... --memory-limit SIZE
        [--requests 100] [--clients 8] [--tokens 24] [--json FILE]

Starts `edge-memllm serve`, asks each model each question once and alone, and then all of them at
once. The memory of the process is looked at a hundred times a second meanwhile.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.environment import environment
from benchmarks.over_http.asking import KINDS, ask
from benchmarks.over_http.program import Most, Program, serving
from edge_memllm.options import byte_size

_QUESTIONS = ("What is the capital of France?", "Name three rivers.", "Why is the sky blue?")
_PACKAGES = ("edge-memllm", "onnxruntime")


@dataclass(frozen=True)
class Found:
    """What was seen while all asked. Bytes and seconds."""

    requests: int
    failures: list[str]
    different: int  # replies that are not those of the same request alone
    by_model: dict[str, int]
    loads: int  # of models, in all
    seconds: float
    alone_seconds: list[float]  # of each request alone, models coming and going
    limit_bytes: int
    models_limit_bytes: int  # what it has for models
    models_bytes: int  # the most that they had, by the server's own account
    own_bytes: int  # the most of the process's own that was in memory
    most_loaded: int  # models at once


Question = tuple[str, str, str, bool]  # model, kind, text, whether streamed


def measure(program: Program, models: Sequence[str], wish: argparse.Namespace) -> Found:
    """Ask one after the other, then all at once."""
    every = list(product(models, KINDS, _QUESTIONS, (False, True)))
    asked = [every[place % len(every)] for place in range(wish.requests)]
    random.Random(wish.seed).shuffle(asked)
    alone: dict[Question, str] = {}
    seconds = []
    with (
        Most(lambda: program.memory().anon_bytes or 0) as own,
        Most(lambda: sum(each == "loaded" for each in program.states().values()), 0.2) as loaded,
        Most(lambda: int(program.metrics()["models_bytes"]), 0.2) as held,
    ):
        for each in sorted(set(asked)):
            start = perf_counter()
            alone[each] = _ask(program, wish.tokens, each)
            seconds.append(perf_counter() - start)
        start = perf_counter()
        with ThreadPoolExecutor(wish.clients) as pool:
            replies = list(pool.map(partial(_kept, program, wish.tokens), asked))
        took = perf_counter() - start
    told = program.settle()
    failures = [str(each) for each in replies if isinstance(each, Exception)]
    return Found(
        requests=len(asked),
        failures=failures,
        different=sum(alone[each] != reply for each, reply in zip(asked, replies, strict=True))
        - len(failures),
        by_model=dict(Counter(model for model, *_ in asked)),
        loads=int(told["models_loaded_total"]),
        seconds=took,
        alone_seconds=seconds,
        limit_bytes=byte_size(wish.memory_limit),
        models_limit_bytes=int(told["models_limit_bytes"]),
        models_bytes=held.value,
        own_bytes=own.value,
        most_loaded=loaded.value,
    )


def _ask(program: Program, tokens: int, question: Question) -> str:
    model, kind, text, stream = question
    return ask(program.url, kind, model, text, tokens, stream=stream)


def _kept(program: Program, tokens: int, question: Question) -> str | Exception:
    try:
        return _ask(program, tokens, question)
    except Exception as error:
        return error


def show(found: Found) -> None:
    """Print what was found."""
    print(
        f"{found.requests} requests, {len(found.failures)} failed, {found.different} replies "
        f"differ from those alone; {found.seconds:.1f} s together, models loaded {found.loads} "
        f"times, at most {found.most_loaded} at once"
    )
    print(
        f"limit {found.limit_bytes / 1e6:.1f} MB, at most {found.own_bytes / 1e6:.1f} of the "
        f"process's own; for models {found.models_limit_bytes / 1e6:.1f}, at most "
        f"{found.models_bytes / 1e6:.1f} by the server's account"
    )
    for failure in found.failures:
        print(failure, file=sys.stderr)


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], epilog="Other options go to the server."
    )
    parser.add_argument("artifacts", type=Path, nargs="+")
    parser.add_argument("--memory-limit", required=True, metavar="SIZE")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=24, help="the most of a reply")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_known_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    wish, words = parse(arguments)
    with serving(wish.artifacts, ["--memory-limit", wish.memory_limit, *words]) as program:
        found = measure(program, [each.name for each in wish.artifacts], wish)
    show(found)
    if wish.json is not None:
        report: dict[str, Any] = {"environment": environment(_PACKAGES), **asdict(found)}
        wish.json.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    return len(found.failures)


if __name__ == "__main__":
    sys.exit(main())
