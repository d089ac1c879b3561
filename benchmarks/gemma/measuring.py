"""Speed, load and memory on the same network: ours and llama.cpp, in turns and within limits.

A round starts every contender anew, in a process of its own that rests while another has its turn.
A cold run is preceded by dropping the table from the page cache, and so is each of its steps, for
those too that have their table in memory: so nothing differs but where rows come from. A warm run
has read the same text just before. Linux only, as the processes of `benchmarks.peers` are.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

from benchmarks.gemma.groups import memory_group
from benchmarks.gemma.making import CONTEXT, Place
from benchmarks.gemma.shapes import SHAPES
from benchmarks.peers.contenders import Contender
from benchmarks.peers.page_cache import drop
from benchmarks.peers.worker import Worker, wait_for_quiet

OURS = "edge-memllm"
IN_MEMORY = "edge-memllm, table in memory"
TWO_BITS = "edge-memllm, int2"
UNMAPPED = "edge-memllm, nothing mapped"
LLAMA = "llama.cpp"
LAZY = "llama.cpp, lazy"
MAPPED = "llama.cpp, all mapped"
STEPS = 32
LIMITS = (2_000_000_000, 1_500_000_000)
DISTURBANCE = 0.03  # share of the processors that others may take during a run
_PATIENCE = 10.0  # seconds to wait for a quiet machine
_MOST_SECONDS = 240.0  # for a contender within a limit
_FIRST_WORD = 32  # ids below may have a meaning


@dataclass(frozen=True)
class Run:
    """A prompt of distinct tokens and some steps: the figures it gives, by what is timed."""

    length: int
    prefill: str | None
    decode: str | None
    cold: bool = False

    @property
    def steps(self) -> int:
        """Decoded tokens."""
        return STEPS if self.decode else 0


# In this order; a warm run follows the cold one of the same prompt.
RUNS = (
    Run(128, "first_token", None, cold=True),
    Run(128, None, "decode_128_cold", cold=True),
    Run(128, None, "decode_128"),
    Run(512, "prefill_cold", None, cold=True),
    Run(512, "prefill", None),
    Run(1024, None, "decode_1024"),
)
# Decoding last: what loading has left in the page cache has gone by then.
LIMITED_RUNS = (
    Run(128, "first_token", None),
    Run(512, "prefill", None),
    Run(128, None, "decode_128"),
)


def contenders(place: Place) -> list[Contender]:
    """Those of the rounds whose files are there; the order is that of the turns."""
    cold = {"mmap": False, "cold": list(_table_place(place))}
    return [
        _ours(OURS, place, "int4", {"cold": True}),
        *(
            [_ours(TWO_BITS, place, "int2", {"cold": True})]
            if place.artifact("int2").exists()
            else []
        ),
        _ours(IN_MEMORY, place, "int4", {"reader": "ram", "cold": True}),
        Contender(LLAMA, LLAMA, "llama", "gguf", cold),
        Contender(LAZY, LAZY, "llama", "gguf", {**cold, "lazy": True}),
    ]


def _ours(name: str, place: Place, form: str, settings: dict[str, Any]) -> Contender:
    packed = {"packed_cache": str(place.packed(form))}
    return Contender(name, name, "edge", None, {**packed, **settings})


def _table_place(place: Place) -> tuple[int, int]:
    from benchmarks.gemma.gguf_file import table_place

    return table_place(place.gguf)


def pack(place: Place, threads: int) -> None:
    """Load each artifact once: its weights are repacked for this processor, and kept."""
    for each in contenders(place):
        if each.name in (OURS, TWO_BITS):
            with Worker(each, _model(place, each), threads, CONTEXT):
                pass


def measure(place: Place, number: int, threads: int) -> dict[str, dict[str, Any]]:
    """Measure a round: contender -> figure -> value, and how much others took of the machine."""
    with ExitStack() as running:
        workers = [
            running.enter_context(Worker(each, _model(place, each), threads, CONTEXT))
            for each in contenders(place)
        ]
        found = {each.contender.name: _loaded(each) for each in workers}
        for run in RUNS:
            prompt = _prompt(place, number, run.length)
            for worker in workers:
                _add(found[worker.contender.name], run, _done(worker, prompt, run))
    return found


def limited(
    place: Place, threads: int, done: Sequence[tuple[str, int | None]]
) -> Iterator[dict[str, Any]]:
    """Yield what each contender does without a limit and within each, one process at a time.

    Pairs of a contender and a limit that are `done` already are left out.
    """
    of = {each.name: each for each in contenders(place)}
    mapped = Contender(MAPPED, MAPPED, "llama", "gguf", {"mmap": True})
    unmapped = Contender(UNMAPPED, UNMAPPED, "edge", None, {"packed_cache": None})
    ours = [of[name] for name in (OURS, TWO_BITS) if name in of]
    for contender in (*ours, unmapped, mapped, of[LAZY]):
        for limit in (None, *LIMITS):
            name = contender.name
            if (name, limit) not in done:
                found = _within(place, contender, limit, threads)
                yield {"contender": name, "limit": limit, **found}


def _within(place: Place, contender: Contender, limit: int | None, threads: int) -> dict[str, Any]:
    for file in _files(place, contender):
        drop(file)  # pages that are cached already would be on nobody's account
    start = time.monotonic()
    with nullcontext() if limit is None else memory_group(limit) as group:
        try:
            model = _model(place, contender)
            with Worker(contender, model, threads, CONTEXT, group, _MOST_SECONDS) as worker:
                found = _loaded(worker)
                for run in LIMITED_RUNS:
                    prompt = _prompt(place, 0, run.length)
                    _add(found, run, _done(worker, prompt, run))
                return found
        except (RuntimeError, BrokenPipeError):
            late = time.monotonic() - start >= _MOST_SECONDS
            return {"ended": f"not done in {_MOST_SECONDS:.0f} s" if late else "out of memory"}


def _files(place: Place, contender: Contender) -> list[Any]:
    if contender.model is not None:
        return [place.gguf]
    form = "int2" if contender.name == TWO_BITS else "int4"
    folders = (place.artifact(form), place.packed(form))
    return [file for folder in folders for file in folder.rglob("*") if file.is_file()]


def _model(place: Place, contender: Contender) -> Any:
    if contender.model is not None:
        return place.gguf
    return place.artifact("int2" if contender.name == TWO_BITS else "int4")


def _loaded(worker: Worker) -> dict[str, Any]:
    settings = dict(worker.loaded["settings"])
    return {"load": worker.loaded["load_seconds"], "settings": settings, "taken_by_others": 0.0}


def _done(worker: Worker, prompt: Sequence[int], run: Run) -> dict[str, Any]:
    wait_for_quiet(DISTURBANCE, _PATIENCE)
    return worker.run(list(prompt), run.steps, cold=run.cold)


def _add(figures: dict[str, Any], run: Run, done: Mapping[str, Any]) -> None:
    if run.prefill == "first_token":
        figures["first_token"] = figures["load"] + done["prefill_seconds"]
    elif run.prefill:
        figures[run.prefill] = run.length / done["prefill_seconds"]
    if run.decode:
        figures[run.decode] = run.steps / sum(done["step_seconds"])
    figures["own_memory"] = max(figures.get("own_memory", 0), done["anon_bytes"] / 1e6)
    figures["mapped_memory"] = max(figures.get("mapped_memory", 0), done["file_bytes"] / 1e6)
    figures["peak_memory"] = done["peak_rss_bytes"] / 1e6
    figures["taken_by_others"] = max(figures["taken_by_others"], done["taken_by_others"])


def _prompt(place: Place, number: int, length: int) -> list[int]:
    words = range(_FIRST_WORD, SHAPES[place.shape].words)
    return random.Random(f"{number}/{length}").sample(words, length)
