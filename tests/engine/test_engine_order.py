"""Who is served when, and where their keys and values lie."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from edge_memllm import Model
from edge_memllm.engine import Engine, Reply, Request
from support.engine import GatedRuntime, held, serial
from support.small_model import open_small_model


class Noting:
    """Allows everything, and notes whose token came."""

    def __init__(self, name: str, order: list[str]) -> None:
        self.name, self.order = name, order

    def allowed(self) -> None:
        return None

    def advance(self, token: int) -> None:
        self.order.append(self.name)


def test_clients_take_turns(model: Model, runtime: GatedRuntime) -> None:
    order: list[str] = []
    with Engine(model, slots=1) as engine:
        replies: list[Reply] = []
        for name in ("a0", "a1", "a2", "a3", "b0", "a4"):
            request = Request(
                prompt=[1],
                max_new_tokens=1,
                client=name[0],
                constraint=partial(Noting, name, order),
            )
            replies.append(engine.submit(request) if replies else held(engine, runtime, request))
        runtime.gate.set()
        for reply in replies:
            list(reply)
    assert order == ["a0", "a1", "b0", "a2", "a3", "a4"]


def test_a_long_prompt_holds_texts_up_for_one_chunk_at_a_time(
    model: Model, runtime: GatedRuntime
) -> None:
    with Engine(model, slots=2, prefill_chunk=4) as engine:
        talking = held(engine, runtime, Request(prompt=[1], max_new_tokens=60, ignore_eos=True))
        reading = engine.submit(Request(prompt=[*range(2, 82)], max_new_tokens=1))
        runtime.gate.set()
        list(reading)
        list(talking)
    # The first token of the text, then a chunk of the prompt and a token of the text in turns.
    begun = runtime.sizes.index(4)
    assert runtime.sizes[:begun] in ([1, 1], [1, 1, 1])
    assert runtime.sizes[begun : begun + 40] == [4, 1] * 20


def test_short_prompts_pass_long_ones_and_long_ones_are_not_forgotten(
    model: Model, runtime: GatedRuntime
) -> None:
    with Engine(model, slots=6, prefill_chunk=4) as engine:
        long = held(engine, runtime, Request(prompt=[*range(2, 102)], max_new_tokens=1))
        short = [engine.submit(Request(prompt=[n, n], max_new_tokens=1)) for n in range(110, 114)]
        runtime.gate.set()
        seconds = [list(reply)[-1].statistics.seconds for reply in (*short, long)]
    assert max(seconds[:-1]) < seconds[-1]


def test_a_shrinking_batch_feeds_only_who_is_there(model: Model, runtime: GatedRuntime) -> None:
    """Texts are brought together, so that no step computes for places between them."""
    with Engine(model, slots=4) as engine:
        replies = [
            held(
                engine, runtime, Request(prompt=[1 + n], max_new_tokens=3 + n * 5, ignore_eos=True)
            )
            for n in (3, 0, 2, 1)
        ]
        runtime.gate.set()
        for reply in replies:
            list(reply)
        grown = engine.statistics
    # Each token but the first of a text is chosen in a step in which it grew.
    assert sum(runtime.steps) == 4 + grown.completion_tokens - 4


def test_places_between_texts_are_left_as_they_were(folder: Path) -> None:
    """Without copies a step goes over idle places; what they hold is used again all the same."""
    runtime = GatedRuntime(copies=False)
    with open_small_model(folder, runtime) as model, Engine(model, slots=3) as engine:
        prompts = [[*range(start, start + 20)] for start in (1, 40, 80)]
        replies = [
            held(engine, runtime, Request(prompt=prompt, max_new_tokens=limit, ignore_eos=True))
            for prompt, limit in zip(prompts, (30, 3, 30), strict=True)
        ]
        runtime.gate.set()
        for reply in replies:
            list(reply)
        assert 3 in runtime.steps[-20:]
        again = Request(prompt=[*prompts[1], 7], max_new_tokens=5)
        pieces = list(engine.submit(again))
        assert pieces[-1].statistics.reused_tokens == 20
        assert [piece.token for piece in pieces] == serial(model, again)
