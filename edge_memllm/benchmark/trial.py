"""One trial on a loaded model: a prompt is read, a fixed number of tokens is decoded.

The number is fixed whatever the model says, and tokens are chosen greedily, so that trials with
the same prompt do the same work and must give the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha256
from time import perf_counter

import numpy as np

from edge_memllm.feeding import Feeder
from edge_memllm.model import Model, Piece
from edge_memllm.records import RecordBuffer
from edge_memllm.sampling import Sampling

_FINGERPRINT_STEPS = 8


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
    with Feeder(model.runtime, model.table, 1, model.prefill_chunk) as feeder:
        logits = feeder.prefill(0, prompt)
        for _ in range(_FINGERPRINT_STEPS):
            digest.update(logits.tobytes())
            logits = feeder.decode([int(logits.argmax())])[0]
        digest.update(logits.tobytes())
    return digest.hexdigest()


def kv_position_bytes(model: Model) -> float:
    """Return the bytes of keys and values of one position, as the runtime holds them."""
    cache = model.runtime.new_cache(1)
    try:
        cache.ensure(1)
        return cache.nbytes / cache.capacity
    finally:
        cache.close()


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
    room = RecordBuffer(model.table.layout, max(1, len(batch)))
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
    model.table.fetch(ids, room)
    return perf_counter() - start
