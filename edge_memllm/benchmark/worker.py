"""A process that measures one variant: loads it, does what it is told, and rests in between.

One JSON object per line, both ways: requests on stdin, replies on stdout. Whatever else would be
printed there goes to stderr. It ends when its stdin does.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from hashlib import sha256
from time import perf_counter
from typing import IO, Any

import numpy as np

import edge_memllm
from edge_memllm.artifact.layout import RecordBuffer
from edge_memllm.benchmark.machine import cached_share, evictor
from edge_memllm.benchmark.plan import Plan, Variant, check_room, distinct_prompt, text_prompt
from edge_memllm.engine.feeding import Feeder
from edge_memllm.errors import EdgeMemLLMError
from edge_memllm.model import Model, Piece
from edge_memllm.process.interrupts import taking_one
from edge_memllm.progress import PACKING
from edge_memllm.sampling import Sampling
from edge_memllm.statistics import process_memory

_FINGERPRINT_STEPS = 8

_STDOUT, _STDERR = 1, 2
_WAKE_TOKENS = 4
_REST_SECONDS, _REST_PROCESSOR, _REST_TRIES = 0.02, 0.001, 100


@dataclass(frozen=True, slots=True)
class Trial:
    """What one trial took."""

    decode_tokens_per_second: float
    prefill_tokens_per_second: float
    time_to_first_token_seconds: float
    step_seconds: list[float]  # of each token after the first, as the caller waits for it
    table_bytes_read_per_token: float
    reads_per_token: float  # of prompt and completion
    reads_per_new_token: float
    record_wait_seconds: float  # in which nothing was computed
    table_share_read: float  # of its records, each counted once
    table_cached_share: float | None  # of the file's pages, before the trial
    kv_bytes: int
    rss_anon_bytes: int | None
    rss_file_bytes: int | None
    acceptance: float | None  # of draft tokens
    tokens: str  # digest of the new ones


def run_trial(
    model: Model,
    prompt: Sequence[int],
    new_tokens: int,
    before_step: Callable[[], None],
    *,
    speculate: int = 0,
    cached_share: float | None = None,
) -> Trial:
    """Prefill ``prompt`` and decode; ``before_step`` runs before each step, off the clock.

    What a step has announced to be read soon may be dropped again by ``before_step``: a cold
    trial is then a little slower than use would be, never faster.
    """
    before_step()
    pieces = model.stream(
        list(prompt),
        max_new_tokens=new_tokens,
        sampling=Sampling(),
        seed=0,
        ignore_eos=True,
        speculate=speculate,
    )
    chosen, seconds, reads = [], [], []
    with closing(pieces):
        for took, piece in _timed(pieces):
            chosen.append(piece.token)
            seconds.append(took)
            reads.append(model.table.statistics.reads)
            last = piece
            before_step()
    assert len(chosen) == new_tokens
    return _trial(model, prompt, chosen, last, seconds[1:], reads, cached_share)


def _timed(pieces: Iterator[Piece]) -> Iterator[tuple[float, Piece]]:
    """Yield the seconds each piece was waited for, and the piece."""
    while True:
        start = perf_counter()
        piece = next(pieces, None)
        if piece is None:
            return
        yield perf_counter() - start, piece


def _trial(
    model: Model,
    prompt: Sequence[int],
    chosen: list[int],
    last: Piece,
    seconds: list[float],
    reads: list[int],
    cached_share: float | None,
) -> Trial:
    statistics = last.statistics
    assert statistics is not None
    assert statistics.prefill_tokens_per_second is not None
    assert statistics.decode_tokens_per_second is not None
    fed = {*prompt, *chosen[:-1]}
    return Trial(
        decode_tokens_per_second=statistics.decode_tokens_per_second,
        prefill_tokens_per_second=statistics.prefill_tokens_per_second,
        time_to_first_token_seconds=statistics.time_to_first_token_seconds,
        step_seconds=seconds,
        table_bytes_read_per_token=statistics.table_bytes_read_per_token,
        reads_per_token=statistics.reads_per_token,
        reads_per_new_token=(reads[-1] - reads[0]) / (len(chosen) - 1),
        record_wait_seconds=statistics.record_wait_seconds,
        table_share_read=len(fed) / model.manifest.model.vocab_size,
        table_cached_share=cached_share,
        kv_bytes=statistics.kv_bytes,
        rss_anon_bytes=statistics.rss_anon_bytes,
        rss_file_bytes=statistics.rss_file_bytes,
        acceptance=_rate(statistics.accepted_tokens, statistics.draft_tokens),
        tokens=sha256(np.asarray(chosen, np.int64).tobytes()).hexdigest(),
    )


def _rate(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def fingerprint(model: Model, prompt: Sequence[int]) -> str:
    """Return a digest of all logits of a few greedy steps: equal only if every bit is."""
    digest = sha256()
    with Feeder(model.runtime, model.source, 1, model.prefill_chunk) as feeder:
        logits = feeder.prefill(0, prompt)
        for _ in range(_FINGERPRINT_STEPS):
            digest.update(logits.tobytes())
            logits = feeder.decode([int(logits.argmax())])[0]
        digest.update(logits.tobytes())
    return digest.hexdigest()


def kv_read_bytes(model: Model, positions: int) -> int:
    """Return the bytes of keys and values that a step looks at behind so many positions."""
    with closing(model.runtime.new_cache(1)) as cache:
        layout = cache.state_layout(positions).values()
    return sum(kind.itemsize * math.prod(shape) for kind, shape in layout)


@dataclass(frozen=True, slots=True)
class ReadTimes:
    """What reading records alone took, as the table delivers them: verified, in place."""

    single_seconds: list[float]  # one record each
    batch_seconds: float
    batch_bytes: int


def time_reads(
    model: Model, singles: Sequence[int], batch: Sequence[int], before_read: Callable[[], None]
) -> ReadTimes:
    """Fetch records one by one, and then many at once; ``before_read`` is off the clock."""
    room = RecordBuffer(model.source.layout, max(1, len(batch)))
    _fetch(model, batch[:1], room, before_read)  # the first call after a rest is slow
    seconds = [_fetch(model, [token], room, before_read) for token in singles]
    took = _fetch(model, batch, room, before_read)
    size = sum(model.table.locate(token)[1] for token in batch)
    return ReadTimes(seconds, took, size)


def _fetch(
    model: Model, tokens: Sequence[int], room: RecordBuffer, before_read: Callable[[], None]
) -> float:
    ids = np.asarray(tokens, np.int64)
    before_read()
    start = perf_counter()
    model.source.fetch(ids, room)
    return perf_counter() - start


def _say_packing(stage: str, done: int, _: int) -> None:
    """Say on stderr what may take minutes, so that nobody waits without knowing why."""
    if stage == PACKING and not done:
        sys.stderr.write(f"{stage}: ...\n")


class Measurer:
    """The loaded variant and the commands it takes; a method per command."""

    def __init__(self, variant: Variant, plan: Plan, opened: ExitStack) -> None:
        self._variant = variant
        self._plan = plan
        start = time.perf_counter()
        settings = {"reader": variant.reader, "progress": _say_packing, **variant.settings}
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
            "kv_read_bytes": {
                str(context): kv_read_bytes(self._model, context + self._plan.new_tokens // 2)
                for context in self._plan.contexts
            },
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
        return fingerprint(self._model, self._other_prompt(min(self._plan.contexts)))

    def read(self, singles: list[int], batch: list[int]) -> dict[str, Any]:
        """Read records alone."""
        return asdict(time_reads(self._model, singles, batch, self._evict))

    def memory(self) -> dict[str, Any]:
        """What this process holds, and the most it ever held."""
        return asdict(process_memory())

    def _run(self, prompt: list[int], tokens: int, share: float | None = None) -> Trial:
        return run_trial(
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
