"""Full queues, cancelled and late requests, draining, failures, what is refused."""

from __future__ import annotations

import gc
import random as pseudo
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_memllm import Model, RequestError
from edge_memllm.engine import Engine, Reply, Request
from edge_memllm.errors import (
    CorruptionError,
    DeadlineError,
    DrainingError,
    EdgeMemLLMError,
    QueueFullError,
    ServiceError,
)
from edge_memllm.sampling import Penalties
from edge_memllm_runtimes.kv_cache import KVBudget
from support.checkpoints import VOCABULARY
from support.engine import GatedRuntime, held, serial, tokens_of, wait_until
from support.small_model import open_small_model, write_small_artifact


def test_a_full_queue_refuses_and_recovers(model: Model, runtime: GatedRuntime) -> None:
    with Engine(model, slots=1, queue=3, per_client=2) as engine:
        first = held(engine, runtime, Request(prompt=[1], max_new_tokens=2))
        waiting = [engine.submit(Request(prompt=[2], client="a")) for _ in range(2)]
        with pytest.raises(
            QueueFullError, match=r"2 texts wait already, 2 of this client; at most 3"
        ):
            engine.submit(Request(prompt=[2], client="a"))
        waiting.append(engine.submit(Request(prompt=[2], client="b")))
        with pytest.raises(
            QueueFullError, match=r"3 texts wait already, 0 .* again in about \d+ s"
        ):
            engine.submit(Request(prompt=[2], client="c"))
        with pytest.raises(QueueFullError) as refused:
            engine.submit(Request(prompt=[2], client="c"))
        assert refused.value.retry_after >= 1
        assert engine.statistics.refused == 3
        runtime.gate.set()
        for reply in (first, *waiting):
            assert list(reply)[-1].finish_reason
        assert list(engine.submit(Request(prompt=[2], client="c")))


def test_cancelling_stops_within_one_token(model: Model, runtime: GatedRuntime) -> None:
    runtime.pause_at = 5
    with Engine(model, slots=2) as engine:
        reply = engine.submit(Request(prompt=[1], max_new_tokens=100, ignore_eos=True))
        for count, _ in enumerate(reply, 1):
            if count == 5:
                reply.cancel()
                break
        runtime.gate.set()
        wait_until(lambda: engine.statistics.under_way == 0)
        assert len(runtime.steps) <= 6
        assert list(reply) == []
        reply.cancel()
        assert engine.statistics.given_up == 1


def test_cancelled_in_the_queue_takes_no_place(model: Model, runtime: GatedRuntime) -> None:
    with Engine(model, slots=1, queue=1) as engine:
        first = held(engine, runtime, Request(prompt=[1], max_new_tokens=3))
        second = engine.submit(Request(prompt=[2]))
        second.cancel()
        runtime.gate.set()
        list(first)
        wait_until(lambda: engine.statistics.given_up == 1)
        assert list(second) == []


def test_many_who_leave_leave_nothing_behind(model: Model) -> None:
    chance = pseudo.Random(3)
    left: list[weakref.ref[Reply]] = []

    def come_and_go(number: int) -> None:
        with engine.submit(
            Request(prompt=[number % 200, 7], ignore_eos=True, client=str(number % 3))
        ) as reply:
            left.append(weakref.ref(reply))
            for place, _ in enumerate(reply):
                if place == number % 4:
                    break

    with Engine(model, slots=3, queue=400) as engine, ThreadPoolExecutor(12) as pool:
        list(pool.map(come_and_go, chance.sample(range(400), 400)))
        wait_until(lambda: not engine.statistics.under_way)
        after = engine.statistics
        assert (after.queued, after.given_up + after.finished) == (0, 400)
        gc.collect()
        assert not any(reply() for reply in left)
        assert len(list(engine.submit(Request(prompt=[1], ignore_eos=True)))) == 128


@pytest.mark.parametrize("waits", [False, True])
def test_a_deadline_ends_a_request(model: Model, runtime: GatedRuntime, waits: bool) -> None:
    with Engine(model, slots=1) as engine:
        if waits:
            first = held(engine, runtime, Request(prompt=[1], max_new_tokens=2))
            reply = engine.submit(Request(prompt=[2], timeout=0.02))
        else:
            reply = held(engine, runtime, Request(prompt=[2], timeout=0.02))
        time.sleep(0.03)
        runtime.gate.set()
        with pytest.raises(DeadlineError, match=r"given 0\.02 seconds, and \d of 128 tokens had"):
            list(reply)
        if waits:
            assert list(first)


def test_draining_finishes_what_there_is(model: Model, runtime: GatedRuntime) -> None:
    engine = Engine(model, slots=1)
    replies = [engine.submit(Request(prompt=[n], max_new_tokens=5)) for n in range(3)]
    assert engine.drain(10)
    assert all(list(reply)[-1].finish_reason for reply in replies)
    with pytest.raises(DrainingError, match="ending and takes no more requests"):
        engine.submit(Request(prompt=[1]))
    assert engine.drain(0)


def test_what_is_not_finished_in_time_is_given_up(model: Model, runtime: GatedRuntime) -> None:
    engine = Engine(model, slots=1)
    replies = [held(engine, runtime, Request(prompt=[1])), engine.submit(Request(prompt=[2]))]
    closing = threading.Thread(target=engine.drain, args=(0.01,))
    closing.start()
    wait_until(lambda: engine._stopped)
    runtime.gate.set()
    closing.join()
    for reply in replies:
        with pytest.raises(DrainingError, match="ended before the reply was finished"):
            list(reply)
    assert runtime.caches[-1].closed


def test_the_model_outlives_the_engine(folder: Path) -> None:
    model = open_small_model(folder)
    with Engine(model) as engine:
        reply = engine.submit(Request(prompt=[1], max_new_tokens=5, ignore_eos=True))
        model.close()
        assert len(list(reply)) == 5
    with pytest.raises(RequestError, match="The model is closed"):
        Engine(model)


def test_a_damaged_record_ends_the_one_that_needs_it(tmp_path: Path) -> None:
    made = write_small_artifact(tmp_path / "a")
    data = bytearray(made.table.read_bytes())
    data[made.manifest.table.records_offset + 99 * made.manifest.table.stride] ^= 1
    made.table.write_bytes(data)
    with open_small_model(made.path) as model, Engine(model, slots=3) as engine:
        only_99 = Penalties(logit_bias={99: 100})
        good = [engine.submit(Request(prompt=[n], max_new_tokens=20)) for n in (1, 2)]
        bad = engine.submit(Request(prompt=[3], max_new_tokens=20, penalties=only_99))
        worse = engine.submit(Request(prompt=[99]))
        for reply in (bad, worse):
            with pytest.raises(CorruptionError, match="the record of token 99 "):
                list(reply)
        for number, reply in enumerate(good, 1):
            assert tokens_of(reply) == serial(model, Request(prompt=[number], max_new_tokens=20))


def test_a_text_that_outgrows_the_memory_limit_ends_alone(
    model: Model, runtime: GatedRuntime
) -> None:
    with Engine(model, slots=2) as engine:
        wait_until(lambda: runtime.caches)
        cache = runtime.caches[-1]
        cache._budget, cache._column_bytes = KVBudget(100), 2  # 50 positions of two sequences
        long = held(engine, runtime, Request(prompt=[1], max_new_tokens=90, ignore_eos=True))
        short = engine.submit(Request(prompt=[2], max_new_tokens=45, ignore_eos=True))
        other = engine.submit(Request(prompt=[3], max_new_tokens=45, ignore_eos=True))
        runtime.gate.set()
        with pytest.raises(RequestError, match="51 positions of 2 sequences are needed, 50 fit"):
            list(long)
        assert [len(list(short)), len(list(other))] == [45, 45]


def test_a_failing_constraint_ends_its_own_reply(model: Model) -> None:
    class Broken:
        def allowed(self) -> np.ndarray:
            return np.zeros(VOCABULARY, np.bool_)

        def advance(self, token: int) -> None:
            raise AssertionError

    with Engine(model) as engine:
        bad = engine.submit(Request(prompt=[1], constraint=Broken))
        with pytest.raises(EdgeMemLLMError, match="allows no token, not even the end"):
            list(bad)
        assert list(engine.submit(Request(prompt=[1])))


def test_a_lost_cache_ends_all_and_the_engine_goes_on(
    model: Model, runtime: GatedRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    class LostError(EdgeMemLLMError):
        pass

    with Engine(model, slots=2) as engine:
        first = held(engine, runtime, Request(prompt=[1]))
        second = engine.submit(Request(prompt=[2]))
        runtime.failure = MemoryError("no room")
        runtime.gate.set()
        with pytest.raises(MemoryError, match="no room"):
            list(first)
        assert list(second)
        third = held(engine, runtime, Request(prompt=[1]))
        runtime.failure = LostError("gone")
        runtime.caches[-1].close()
        runtime.gate.set()
        with pytest.raises(LostError, match="gone"):
            list(third)
        assert list(engine.submit(Request(prompt=[1])))
    assert "a step failed, and with it all requests under way" in caplog.text


class Panic(BaseException):
    """What a panic of a library in Rust is: no Exception."""


def test_a_panic_in_a_step_ends_the_replies_of_that_step(
    model: Model, runtime: GatedRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    with Engine(model, slots=2) as engine:
        bad = held(engine, runtime, Request(prompt=[1], ignore_eos=True))
        good = engine.submit(Request(prompt=[2], max_new_tokens=9))
        runtime.failure = Panic("index out of bounds")
        runtime.gate.set()
        with pytest.raises(ServiceError, match=r"failed on this request \(Panic: index out of b"):
            list(bad)
        assert tokens_of(good) == serial(model, Request(prompt=[2], max_new_tokens=9))
        assert engine.running
    assert caplog.text.count("a step failed, and with it one reply") == 1


def test_a_panic_in_a_step_of_many_is_tried_again_alone(
    model: Model, runtime: GatedRuntime
) -> None:
    wish = {"max_new_tokens": 9, "ignore_eos": True}
    with Engine(model, slots=2) as engine:
        first = held(engine, runtime, Request(prompt=[1], **wish))
        second = engine.submit(Request(prompt=[2], **wish))
        runtime.pause_at = 4  # both grow
        runtime.gate.set()
        wait_until(lambda: runtime.pause_at is None)
        runtime.failure = Panic("once")
        runtime.gate.set()
        for number, reply in enumerate((first, second), 1):
            assert tokens_of(reply) == serial(model, Request(prompt=[number], **wish))


@pytest.mark.parametrize("place", ["a constraint", "the tokenizer", "a record"])
def test_a_panic_of_a_library_ends_its_own_reply(
    model: Model, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def panic(*_: object) -> None:
        raise Panic("boom")

    class Constraint:
        def allowed(self) -> None:
            panic()

    with Engine(model) as engine, monkeypatch.context() as patched:
        wish = Request(prompt=[1], constraint=Constraint if place == "a constraint" else None)
        if place == "the tokenizer":
            patched.setattr(type(model.tokenizer), "bytes_of", panic)
        elif place == "a record":
            patched.setattr(type(model.table), "fetch", panic)
        with pytest.raises(ServiceError, match="Panic: boom"):
            list(engine.submit(wish))
        patched.undo()
        assert list(engine.submit(Request(prompt=[1])))
        assert engine.running


def test_without_room_for_a_cache_those_who_wait_are_told_and_the_next_are_served(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Full(GatedRuntime):
        full = True

        def new_cache(self, batch: int) -> Any:
            if self.full:
                raise MemoryError("no room")
            return super().new_cache(batch)

    runtime = Full()
    with open_small_model(folder, runtime) as model, Engine(model) as engine:
        for _ in range(2):
            with pytest.raises(MemoryError, match="no room"):
                list(engine.submit(Request(prompt=[1])))
        runtime.full = False
        wait_until(lambda: engine.running)
        found = None
        while found is None:  # one more may be told of the room that was not there before
            try:
                found = list(engine.submit(Request(prompt=[1])))
            except MemoryError:
                continue
        assert found[-1].finish_reason
    assert "there is no room to work in" in caplog.text


@pytest.mark.parametrize("waits", [False, True])
def test_a_deadline_holds_while_a_step_does_not_come_back(
    model: Model, runtime: GatedRuntime, waits: bool
) -> None:
    with Engine(model, slots=1) as engine:
        late = held(engine, runtime, Request(prompt=[2], timeout=None if waits else 0.05))
        if waits:
            late = engine.submit(Request(prompt=[2], timeout=0.05))
        start = time.monotonic()
        with pytest.raises(DeadlineError, match=r"given 0\.05 seconds, and 0 of 128 tokens had"):
            list(late)
        assert time.monotonic() - start < 5  # the gate waits for 10
        runtime.gate.set()
        wait_until(lambda: engine.statistics.given_up == 1)
        assert list(engine.submit(Request(prompt=[1])))


def test_a_deadline_can_count_from_earlier(model: Model) -> None:
    with Engine(model) as engine:
        late = engine.submit(Request(prompt=[2], timeout=60, since=time.monotonic() - 61))
        with pytest.raises(DeadlineError, match="given 60 seconds"):
            list(late)
        assert list(engine.submit(Request(prompt=[2], timeout=60, since=time.monotonic() - 1)))


def test_closing_waits_for_a_step_only_as_long_as_it_may(
    model: Model, runtime: GatedRuntime
) -> None:
    engine = Engine(model)
    reply = held(engine, runtime, Request(prompt=[1]))
    assert not engine.close(0.01)
    runtime.gate.set()
    assert engine.close()
    with pytest.raises(DrainingError):
        list(reply)


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"prompt": [VOCABULARY]}, "token 0 is 300, expected an integer from 0 to 299"),
        ({"prompt": [1] * 200}, "the prompt has 200 tokens and the model's context holds 128"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1, expected"),
        ({"max_new_tokens": False}, "max_new_tokens is False, expected"),
        ({"max_new_tokens": 0.0}, r"max_new_tokens is 0\.0, expected"),
        ({"choices": 65}, "choices is 65, expected at most 64"),
        ({"choices": 0}, "choices is 0, expected an integer of at least 1"),
        ({"top": 101}, "top is 101, expected an integer from 0 to 100"),
        ({"top": True}, "top is True, expected"),
        ({"timeout": 0}, "timeout is 0, expected seconds above 0"),
        ({"timeout": float("nan")}, "timeout is nan, expected seconds"),
        ({"seed": -1}, "seed is -1"),
        ({"stop": [""]}, "a stop string has 0 characters"),
        ({"penalties": Penalties(logit_bias={300: 1})}, "logit_bias: token 0 is 300, expected"),
        ({"penalties": Penalties(logit_bias={-1: 1})}, "logit_bias: token 0 is -1, expected"),
    ],
)
def test_what_cannot_be_done_is_refused_at_once(
    model: Model, wish: dict[str, Any], message: str
) -> None:
    with Engine(model) as engine:
        with pytest.raises(RequestError, match=message):
            engine.submit(Request(**{"prompt": [1], **wish}))
        assert engine.statistics.requests == 0


@pytest.mark.parametrize("option", ["slots", "queue", "per_client", "prefill_chunk"])
def test_an_engine_of_nothing_is_refused(model: Model, option: str) -> None:
    with pytest.raises(RequestError, match=f"{option} is 0, expected an integer of at least 1"):
        Engine(model, **{option: 0})
