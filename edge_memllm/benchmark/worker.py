"""A process that measures one variant: loads it, does what it is told, and rests in between.

One JSON object per line, both ways: requests on stdin, replies on stdout. Whatever else would be
printed there goes to stderr. It ends when its stdin does.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict
from typing import IO, Any

import edge_memllm
from edge_memllm.benchmark import trial
from edge_memllm.benchmark.page_cache import cached_share, evictor
from edge_memllm.benchmark.plan import Plan, Variant
from edge_memllm.benchmark.prompts import check_room, distinct_prompt, text_prompt
from edge_memllm.errors import EdgeMemLLMError
from edge_memllm.interrupts import taking_one
from edge_memllm.statistics import process_memory

_STDOUT, _STDERR = 1, 2
_WAKE_TOKENS = 4
_REST_SECONDS, _REST_PROCESSOR, _REST_TRIES = 0.02, 0.001, 100


class Measurer:
    """The loaded variant and the commands it takes; a method per command."""

    def __init__(self, variant: Variant, plan: Plan, opened: ExitStack) -> None:
        self._variant = variant
        self._plan = plan
        start = time.perf_counter()
        settings = {"reader": variant.reader, **variant.settings}
        self._model = opened.enter_context(edge_memllm.load(variant.artifact, **settings))
        self._load_seconds = time.perf_counter() - start
        self._table = variant.artifact / self._model.manifest.table.file
        cold = variant.cache == "cold"
        self._evict = opened.enter_context(evictor(self._table)) if cold else _nothing
        self._text = [] if plan.text is None else self._model.tokenize(plan.text)
        model = self._model.manifest.model
        check_room(plan, model.vocab_size, model.max_position_embeddings)

    def describe(self) -> dict[str, Any]:
        """What is loaded, and what a step of it moves."""
        return {
            **self._model.describe(),
            "load_seconds": self._load_seconds,
            "kv_position_bytes": trial.kv_position_bytes(self._model),
        }

    def measure(self, context: int, number: int) -> dict[str, Any]:
        """One trial, with the table in its state."""
        prompt = self._prompt(context, number)
        if self._variant.cache == "warm":
            self._run(prompt, self._plan.new_tokens)  # brings the records in
        else:
            self._run(self._other_prompt(_WAKE_TOKENS), _WAKE_TOKENS)  # wakes threads, as that does
        self._evict()
        share = cached_share(self._table)
        return asdict(self._run(prompt, self._plan.new_tokens, share))

    def fingerprint(self) -> str:
        """A digest of the logits that follow a fixed prompt."""
        return trial.fingerprint(self._model, self._other_prompt(min(self._plan.contexts)))

    def read(self, singles: list[int], batch: list[int]) -> dict[str, Any]:
        """Read records alone."""
        return asdict(trial.time_reads(self._model, singles, batch, self._evict))

    def memory(self) -> dict[str, Any]:
        """What this process holds, and the most it ever held."""
        return asdict(process_memory())

    def _run(self, prompt: list[int], tokens: int, share: float | None = None) -> trial.Trial:
        return trial.run_trial(
            self._model,
            prompt,
            tokens,
            self._evict,
            speculate=self._variant.speculate,
            cached_share=share,
        )

    def _other_prompt(self, length: int) -> list[int]:
        """A prompt that no trial has: it must not bring records in that one will ask for."""
        return self._prompt(length, self._plan.repeats)

    def _prompt(self, length: int, number: int) -> list[int]:
        if self._plan.text is not None:
            return text_prompt(self._plan, length, number, self._text)
        vocabulary = self._model.manifest.model.vocab_size
        return distinct_prompt(self._plan, length, number, vocabulary)


def _nothing() -> None:
    """What any trial but a cold one does before each step."""


def serve(requests: Iterable[str], reply: Callable[[dict[str, Any]], None]) -> None:
    """Answer each request; the first says what to load. An error ends the process."""
    lines = iter(requests)
    first = json.loads(next(lines))
    plan = Plan(**first["plan"] | {"contexts": tuple(first["plan"]["contexts"])})
    with ExitStack() as opened:
        try:
            measurer = Measurer(Variant.from_dict(first["variant"]), plan, opened)
            reply({"done": measurer.describe()})
            for line in lines:
                request = json.loads(line)
                done = getattr(measurer, request.pop("command"))(**request)
                rest()
                reply({"done": done})
        except EdgeMemLLMError as error:
            reply({"error": type(error).__name__, "message": str(error)})


def rest() -> None:
    """Wait until this process uses no processor, so that it does not disturb the next one.

    The threads of a runtime go on looking for work for a while.
    """
    for _ in range(_REST_TRIES):
        before = time.process_time()
        time.sleep(_REST_SECONDS)
        if time.process_time() - before < _REST_PROCESSOR:
            return


def main() -> int:
    """Serve stdin and stdout."""
    with (
        # Ctrl-C reaches the parent, which ends us; a second one ends both.
        taking_one([signal.SIGINT], lambda *_: None),
        os.fdopen(os.dup(_STDOUT), "w", encoding="utf-8") as replies,
    ):
        os.dup2(_STDERR, _STDOUT)
        serve(sys.stdin, lambda content: _write(replies, content))
    return 0


def _write(replies: IO[str], content: dict[str, Any]) -> None:
    replies.write(json.dumps(content) + "\n")
    replies.flush()


if __name__ == "__main__":
    sys.exit(main())
