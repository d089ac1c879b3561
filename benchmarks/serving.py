"""What clients get together and each: throughput and waiting of the engine, without HTTP.

    python benchmarks/serving.py ARTIFACT [--clients 1,2,4,8] [--rounds 3] [--json FILE]

Each client asks one thing after the other, with prompts of random tokens that share no beginning.
Rounds go through the numbers of clients in turns, forwards and backwards. Where the gain stops is
told by the time of the graph's own steps, by the number of texts in them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any

import numpy as np

import edge_memllm
from edge_memllm import Sampling
from edge_memllm.benchmark.machine import environment
from edge_memllm.benchmark.report import ratio_of_medians
from edge_memllm.engine import Engine, Request

COLUMNS = (
    *("clients", "tokens/s", "to one client", "first token, ms", "gap, ms", "95 %", "worst"),
    *("texts a step", "records a token", "in the graph"),
)


@dataclass(frozen=True)
class Round:
    """What one number of clients got in one round. Seconds."""

    clients: int
    tokens_per_second: float  # of all clients together, prompts not counted
    first_token: list[float]  # one per request
    gaps: list[float]  # between the tokens of a reply
    texts_per_step: float
    records_per_token: float  # of prompts and replies
    graph_share: float  # of the time, in the graph


class TimedRuntime:
    """The model's runtime, with a note of how long its steps took."""

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime
        self.name, self.device = runtime.name, runtime.device
        self.seconds: dict[tuple[int, int], list[float]] = defaultdict(list)  # by [B, T]

    def step(self, buffer: Any, distinct: int, index: Any, *rest: Any, **more: Any) -> Any:
        """Pass a step on and time it."""
        start = perf_counter()
        logits = self._runtime.step(buffer, distinct, index, *rest, **more)
        self.seconds[index.shape].append(perf_counter() - start)
        return logits

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    def total(self) -> float:
        """Seconds in all steps so far."""
        return sum(map(sum, self.seconds.values()))


def client(
    engine: Engine, prompts: Sequence[list[int]], new_tokens: int
) -> tuple[list[float], list[float]]:
    """Ask one thing after the other; the seconds to each first token, and between tokens."""
    first, gaps = [], []
    for prompt in prompts:
        request = Request(
            prompt=prompt, max_new_tokens=new_tokens, sampling=Sampling(), ignore_eos=True
        )
        last = perf_counter()
        for place, _ in enumerate(engine.submit(request)):
            now = perf_counter()
            (gaps if place else first).append(now - last)
            last = now
    return first, gaps


def measure(engine: Engine, runtime: TimedRuntime, clients: int, wish: argparse.Namespace) -> Round:
    """Let so many clients ask at once, until all have their replies."""
    vocabulary = engine.model.manifest.model.vocab_size
    drawn = np.random.default_rng([wish.seed, clients, engine.statistics.requests])
    shape = (clients, wish.requests, wish.prompt_tokens)
    prompts = drawn.integers(0, vocabulary, shape).tolist()
    before, graph = engine.statistics, runtime.total()
    start = perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        asked = [pool.submit(client, engine, each, wish.new_tokens) for each in prompts]
        found = [each.result() for each in asked]
    seconds = perf_counter() - start
    after = engine.statistics
    tokens = after.completion_tokens - before.completion_tokens
    fed = tokens + after.prompt_tokens - before.prompt_tokens
    grown = tokens - clients * wish.requests  # the first of each comes with its prompt
    return Round(
        clients=clients,
        tokens_per_second=tokens / seconds,
        first_token=[each for first, _ in found for each in first],
        gaps=[each for _, gaps in found for each in gaps],
        texts_per_step=grown / max(1, after.steps - before.steps),
        records_per_token=(after.records_read - before.records_read) / fed,
        graph_share=(runtime.total() - graph) / seconds,
    )


def summary(rounds: Sequence[Round], single: Sequence[Round]) -> dict[str, Any]:
    """The medians of one number of clients, against a single client in the same rounds."""
    speeds = [each.tokens_per_second for each in rounds]
    alone = [each.tokens_per_second for each in single]
    first = np.concatenate([each.first_token for each in rounds])
    gaps = np.concatenate([each.gaps for each in rounds])
    return {
        "clients": rounds[0].clients,
        "tokens_per_second": median(speeds),
        "against_one": asdict(ratio_of_medians(speeds, alone)),
        "first_token_seconds": {"median": float(np.median(first)), "worst": float(first.max())},
        "gap_seconds": {
            "median": float(np.median(gaps)),
            "p95": float(np.percentile(gaps, 95)),
            "worst": float(gaps.max()),
        },
        "texts_per_step": mean(each.texts_per_step for each in rounds),
        "records_per_token": mean(each.records_per_token for each in rounds),
        "graph_share": mean(each.graph_share for each in rounds),
    }


def profile(runtime: TimedRuntime) -> list[dict[str, Any]]:
    """The median time of the graph's steps in which texts grow, by the number of texts."""
    steps = {texts: each for (texts, tokens), each in runtime.seconds.items() if tokens == 1}
    return [
        {
            "texts": texts,
            "steps": len(seconds),
            "milliseconds": 1e3 * median(seconds),
            "milliseconds_per_text": 1e3 * median(seconds) / texts,
        }
        for texts, seconds in sorted(steps.items())
    ]


def show(report: dict[str, Any]) -> None:
    """Print the report as two tables."""
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
    for row in report["clients"]:
        first, gap = row["first_token_seconds"], row["gap_seconds"]
        ratio = row["against_one"]
        print(
            f"| {row['clients']} | {row['tokens_per_second']:.1f} "
            f"| {ratio['ratio']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f}) "
            f"| {1e3 * first['median']:.0f} | {1e3 * gap['median']:.1f} | {1e3 * gap['p95']:.1f} "
            f"| {1e3 * gap['worst']:.0f} | {row['texts_per_step']:.1f} "
            f"| {row['records_per_token']:.2f} | {row['graph_share']:.0%} |"
        )
    print("\n| texts in a step | ms of the graph | ms a text | steps |\n|" + " --- |" * 4)
    for row in report["steps"]:
        print(
            f"| {row['texts']} | {row['milliseconds']:.2f} "
            f"| {row['milliseconds_per_text']:.2f} | {row['steps']} |"
        )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--clients", default="1,2,4,8", help="numbers of clients; 1 is added")
    parser.add_argument("--requests", type=int, default=4, help="of each client in a round")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--reader", default="auto")
    parser.add_argument("--prefill-chunk", type=int)
    parser.add_argument("--batch-invariant", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    wish = parse(arguments)
    numbers = sorted({1, *map(int, wish.clients.split(","))})
    rounds: dict[int, list[Round]] = {number: [] for number in numbers}
    with edge_memllm.load(
        wish.artifact, device="cpu", threads=wish.threads, reader=wish.reader
    ) as model:
        model.runtime = runtime = TimedRuntime(model.runtime)
        with Engine(
            model,
            slots=numbers[-1],
            prefill_chunk=wish.prefill_chunk,
            batch_invariant=wish.batch_invariant,
        ) as engine:
            measure(engine, runtime, numbers[-1], wish)  # what is made once is made here
            runtime.seconds.clear()
            for place in range(wish.rounds):
                for number in numbers[:: 1 if place % 2 else -1]:
                    rounds[number].append(measure(engine, runtime, number, wish))
                    print(f"round {place + 1}: {number} clients", file=sys.stderr)
        reader = model.reader
    report = {
        "environment": environment(),
        "reader": reader,
        "settings": {k: v for k, v in vars(wish).items() if k not in ("artifact", "json")},
        "clients": [summary(each, rounds[1]) for each in rounds.values()],
        "steps": profile(runtime),
    }
    show(report)
    if wish.json is not None:
        wish.json.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
