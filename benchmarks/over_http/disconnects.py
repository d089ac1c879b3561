"""Clients that leave at random moments, in every protocol and with tools: what stays behind.

    python -m benchmarks.over_http.disconnects ARTIFACT [--count 1000] [--clients 8] [--json FILE]

Starts `edge-memllm serve`. After a tenth of the clients, and after all, it counts descriptors,
threads and memory of the process, and slots, keys and values of the engine. Then replies that are
asked for at once are compared with those that come one after the other.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from time import sleep
from typing import Any

from benchmarks.environment import environment
from benchmarks.over_http.asking import KINDS, ask
from benchmarks.over_http.program import PATIENCE, Program, serving

_WORDS = ("a", "river", "was", "wide", "and", "slow", "nobody", "had", "seen", "its", "other")
_SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}
_FUNCTION = {"name": "weather", "description": "The weather of a city.", "parameters": _SCHEMA}
_TOOLS = {
    "chat": {"type": "function", "function": _FUNCTION},
    "responses": {"type": "function", **_FUNCTION},
    "messages": {"name": "weather", "description": "Weather.", "input_schema": _SCHEMA},
}
_MUST = {"chat": "required", "responses": "required", "messages": {"type": "any"}}
_QUESTIONS = ("What is the capital of France?", "Name three rivers.")
_RESET = b"\1\0\0\0\0\0\0\0"  # SO_LINGER: a reset in place of an end


@dataclass(frozen=True)
class Held:
    """What the server's process and its engine hold while nothing goes on."""

    open_files: int
    threads: int
    own_bytes: int
    kv_bytes: int
    slots_busy: int
    queued: int
    given_up: int  # texts, since the beginning
    finished: int

    @classmethod
    def by(cls, program: Program) -> Held:
        """Wait until nothing goes on, and look."""
        told = program.settle()
        return cls(
            open_files=min(program.open_files() for _ in _moments()),  # connections that end
            threads=program.threads(),
            own_bytes=program.memory().anon_bytes or 0,
            kv_bytes=int(told["kv_bytes"]),
            slots_busy=int(told["slots_busy"]),
            queued=int(told["queued"]),
            given_up=int(told["given_up_total"]),
            finished=int(told["finished_total"]),
        )


def _moments() -> Iterator[None]:
    for _ in range(20):
        yield
        sleep(0.05)


def body_of(kind: str, dice: random.Random, tokens: int) -> dict[str, Any]:
    """Return a random request of a protocol."""
    text = " ".join(dice.choices(_WORDS, k=dice.randrange(1, 30)))
    body: dict[str, Any] = {**KINDS[kind].body(text, tokens), "stream": dice.random() < 0.6}
    body["temperature"] = dice.choice([0, 0.8])
    if kind == "completions":
        body |= {"n": dice.choice([1, 1, 3]), "ignore_eos": True}
    elif dice.random() < 0.6:
        body["tools"] = [_TOOLS[kind]]
        if dice.random() < 0.5:
            body["tool_choice"] = _MUST[kind]
    return body


def leave(port: int, tokens: int, seed: int) -> None:
    """Ask for something and leave at a random moment, politely or not."""
    dice = random.Random(seed)
    kind = dice.choice(sorted(KINDS))
    content = json.dumps(body_of(kind, dice, tokens)).encode()
    head = (
        f"POST {KINDS[kind].path} HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    whole = head.encode() + content
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
        if dice.random() < 0.1:  # in the middle of asking
            client.sendall(whole[: dice.randrange(1, len(whole))])
        else:
            client.sendall(whole)
            if dice.random() < 0.5:
                sleep(dice.random() * 0.1)
            elif dice.random() < 0.6:
                client.recv(dice.randrange(1, 2000))
        if dice.random() < 0.3:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)


def disconnect(program: Program, seeds: Sequence[int], clients: int, tokens: int) -> Held:
    """Let so many clients come and leave; return what is held behind them."""
    port = int(program.url.rpartition(":")[2])
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(partial(leave, port, tokens), seeds))
    return Held.by(program)


def differing(program: Program, model: str, tokens: int) -> int:
    """Return how many replies that come at once are not those that come one after the other."""
    asked = list(product(KINDS, _QUESTIONS, (False, True)))

    def reply(question: tuple[str, str, bool]) -> str:
        kind, text, stream = question
        return ask(program.url, kind, model, text, tokens, stream=stream)

    alone = list(map(reply, asked))
    with ThreadPoolExecutor(len(asked)) as pool:
        return sum(a != b for a, b in zip(alone, pool.map(reply, asked), strict=True))


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], epilog="Other options go to the server."
    )
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--count", type=int, default=1000, help="clients that leave")
    parser.add_argument("--clients", type=int, default=8, help="of them at once")
    parser.add_argument("--tokens", type=int, default=48, help="the most of a reply")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_known_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    wish, words = parse(arguments)
    first = wish.count // 10
    with serving([wish.artifact], words) as program:
        # What is made once is made by the first tenth, and by replies that come to their end.
        model = next(iter(program.states()))
        differing(program, model, wish.tokens)
        before = disconnect(program, range(first), wish.clients, wish.tokens)
        after = disconnect(program, range(first, wish.count), wish.clients, wish.tokens)
        different = differing(program, model, wish.tokens)
    for name, held in ((first, before), (wish.count, after)):
        print(f"after {name} clients that left: {held}")
    print(f"replies at once that differ from those one after the other: {different}")
    if wish.json is not None:
        held = {"before": asdict(before), "after": asdict(after), "different": different}
        report = {"environment": environment(("edge-memllm", "onnxruntime")), **held}
        wish.json.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    return different


if __name__ == "__main__":
    sys.exit(main())
