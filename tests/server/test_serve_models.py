"""Several models behind one address: loaded when asked for, freed when idle or for another."""

from __future__ import annotations

import gc
import threading
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

import edge_memllm
from edge_memllm import Model, Sampling
from edge_memllm.engine import Engine
from edge_memllm.errors import RequestError
from edge_memllm.loading import plan_loading
from edge_memllm.process.memory_account import MemoryAccount, MemoryShare
from edge_memllm.server.models import ServedModel, ServedModels
from edge_memllm.server.service import ServerState, Service
from edge_memllm.server.settings import Settings
from edge_memllm.statistics import process_memory
from support.checkpoints import MakeArtifact
from support.engine import GatedRuntime, wait_until
from support.server import events_of
from support.several_models import NAMES, Home, served
from support.small_model import open_small_model

GREEDY = {"temperature": 0, "ignore_eos": True}


def ask(url: str, model: str | None, **more: Any) -> httpx.Response:
    body = {"prompt": "Hello", "max_tokens": 4, **GREEDY, **more}
    if model is not None:
        body["model"] = model
    return httpx.post(f"{url}/v1/completions", json=body, timeout=30)


def states(url: str) -> dict[str, str]:
    listed = httpx.get(f"{url}/v1/models").json()["data"]
    return {each["id"]: each["state"] for each in listed}


def test_models_come_when_they_are_named(folder: Path) -> None:
    home = Home(folder)
    with served(home.models()) as url:
        assert states(url) == dict.fromkeys(NAMES, "unloaded")
        reply = ask(url, "b").json()
        assert (reply["model"], home.opened) == ("b", ["b"])
        assert states(url) == {"a": "unloaded", "b": "loaded", "c": "unloaded"}
        assert httpx.get(f"{url}/health").json() == {
            "status": "ok",
            "models": {"unloaded": 2, "loaded": 1},
        }
        assert httpx.get(f"{url}/v1/models/b").json()["max_model_len"] == 128
        tokens = httpx.post(f"{url}/tokenize", json={"model": "c", "prompt": "Hi"})
        assert tokens.json()["count"] == 2
        assert httpx.get(f"{url}/tokenizer_info?model=c").json()["model_max_length"] == 128


def test_a_request_names_one_of_them(folder: Path) -> None:
    with served(Home(folder).models()) as url:
        missing, unknown = ask(url, None), ask(url, "d")
    assert missing.status_code == 400
    assert "this server has several models: a, b, c. Name one." in missing.text
    assert unknown.status_code == 404
    said = unknown.json()["error"]["message"]
    assert said == 'There is no model "d" here. This server has "a", "b", "c".'


def test_an_idle_model_is_freed_and_comes_back(folder: Path) -> None:
    home = Home(folder)
    with served(home.models(idle=0.05)) as url:
        first = ask(url, "a").json()["choices"]
        wait_until(lambda: states(url)["a"] == "unloaded")
        assert ask(url, "a").json()["choices"] == first
        wait_until(lambda: states(url)["a"] == "unloaded")
        stream = ask(url, "a", stream=True).text
        told = "".join(e["choices"][0]["text"] for e in events_of(stream) if e != "[DONE]")
        assert told == first[0]["text"]
        made = httpx.get(f"{url}/metrics").text
        assert "edge_memllm_completion_tokens_total 12" in made
    assert home.opened == ["a"] * 3


def test_sums_hold_while_a_model_is_freed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, begun, gate = Home(folder), threading.Event(), threading.Event()

    def slowly(service: Service, patience: float) -> bool:
        begun.set()
        gate.wait(10)
        return close(service, patience)

    close = Service.close
    monkeypatch.setattr(Service, "close", slowly)
    with served(home.models(idle=0.05)) as url:
        ask(url, "a")
        for moment in (begun.is_set, lambda: states(url)["a"] == "unloaded"):
            wait_until(moment)
            assert "edge_memllm_completion_tokens_total 4" in httpx.get(f"{url}/metrics").text
            gate.set()


def test_what_is_in_use_is_not_freed(folder: Path) -> None:
    home = Home(folder)
    home.runtimes["a"] = GatedRuntime()
    home.runtimes["a"].gate.clear()
    with served(home.models(idle=0.05)) as url, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, url, "a")
        wait_until(lambda: states(url)["a"] == "loaded")
        assert ask(url, "b").status_code == 200
        wait_until(lambda: states(url)["b"] == "unloaded")
        assert states(url)["a"] == "loaded"
        home.runtimes["a"].gate.set()
        assert asked.result().status_code == 200


def test_the_longest_unused_makes_room(folder: Path) -> None:
    home = Home(folder)
    with served(home.models(room=2)) as url:
        for name in ("a", "b", "a", "c"):
            assert ask(url, name).status_code == 200
        assert states(url) == {"a": "loaded", "b": "unloaded", "c": "loaded"}
    assert home.opened == ["a", "b", "c"]


def test_a_hundred_requests_over_three_models_where_two_fit(folder: Path) -> None:
    home = Home(folder)
    with open_small_model(folder) as model:
        alone = model.generate("Hello", max_new_tokens=4, sampling=Sampling(), ignore_eos=True)
    with served(home.models(room=2)) as url, ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda number: ask(url, NAMES[number % 3]), range(100)))
    assert Counter(reply.status_code for reply in replies) == {200: 100}
    assert {reply.json()["choices"][0]["text"] for reply in replies} == {alone}
    assert Counter(reply.json()["model"] for reply in replies) == {"a": 34, "b": 33, "c": 33}


def test_one_that_can_never_fit_is_refused_with_the_reason(folder: Path) -> None:
    models = Home(folder).models(room=2)
    models.all[2].refusal = "the model 'c' does not fit: 5 are needed"
    with served(models) as url:
        refused = ask(url, "c")
        assert ask(url, "a").status_code == 200
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "model_does_not_fit")
    assert "5 are needed" in refused.text


def test_the_first_must_fit(folder: Path) -> None:
    models = Home(folder).models(room=0)
    with pytest.raises(RequestError, match="'a' does not fit"):
        models.load(models.all[0])


def test_what_cannot_be_loaded_is_told_and_tried_again(folder: Path) -> None:
    home = Home(folder)
    models = home.models(room=2)
    (model, *_), opening = models.all, models.all[0].open

    def failing(_: MemoryShare | None) -> Service:
        raise edge_memllm.errors.StorageError("the disk is gone")

    model.open = failing
    with served(models) as url:
        assert ask(url, "a").status_code == 500
        assert httpx.get(f"{url}/health").json()["reason"] == "StorageError"
        model.open = opening
        assert ask(url, "a").status_code == 200
        assert httpx.get(f"{url}/health").json()["status"] == "ok"
        assert ask(url, "b").status_code == 200  # its memory was given back
    assert home.opened == ["a", "b"]


def test_who_leaves_while_it_loads_is_forgotten(folder: Path) -> None:
    home, gate = Home(folder), threading.Event()
    models = home.models(idle=0.05)
    opening = models.all[0].open
    assert opening is not None

    def slow(share: MemoryShare | None) -> Service:
        gate.wait(10)
        return opening(share)

    models.all[0].open = slow
    with served(models) as url:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/completions", json={"model": "a", "prompt": "x"}, timeout=0.3)
        wait_until(lambda: home.state.metrics.under_way == 0)
        gate.set()
        wait_until(lambda: home.opened == ["a"])
        wait_until(lambda: states(url)["a"] == "unloaded")
        assert models.all[0].users == 0


def test_a_text_that_grows_frees_an_idle_model() -> None:
    account = MemoryAccount(100)
    growing, idle = MemoryShare(account, 20, 10, 1), MemoryShare(account, 40, 10, 1)
    assert growing.open()
    assert idle.open()
    assert not MemoryShare(account, 21, 0, 0).open()

    others = [idle]

    def make_room() -> bool:
        for other in others:
            other.close()
        return bool(others) and others.pop() is idle

    assert growing.exchange(0, 15) is None  # beyond what was kept for it
    account.make_room = make_room
    assert growing.exchange(15, 70) is None
    assert growing.exchange(70, 90) == 80
    assert growing.limit == 80
    growing.close()
    assert account.held == 0


def test_a_real_model_gives_its_memory_back(make_artifact: MakeArtifact) -> None:
    path = make_artifact(hidden_size=256, vocab_size=2000, graph_weights="fp32")
    manifest, plan = plan_loading(path, packed_cache=None)
    account = MemoryAccount(1 << 30)
    share = MemoryShare(account, plan.model_bytes, plan.first_bytes(manifest, 2), plan.score_bytes)
    state = ServerState(Settings("a"))
    kept: list[weakref.ref[Any]] = []

    def opening(share: MemoryShare | None) -> Service:
        model: Model = edge_memllm.load(path, packed_cache=None, memory_share=share)
        kept.extend(map(weakref.ref, (model, model.runtime, model.runtime._session)))
        return Service(Engine(model, slots=2), Settings("a"), None, state)

    models = ServedModels(
        state, [ServedModel("a", opening, share=share)], account=account, idle_seconds=0.05
    )
    with served(models) as url:
        first = ask(url, "a").json()["choices"]
        loaded = account.held
        wait_until(lambda: states(url)["a"] == "unloaded")
        gc.collect()
        assert [each() for each in kept] == [None] * 3
        assert account.held == 0 < share.least_bytes <= loaded
        before = process_memory().anon_bytes
        assert ask(url, "a").json()["choices"] == first
        wait_until(lambda: states(url)["a"] == "unloaded")
        after = process_memory().anon_bytes
        assert before is None or after is None or after - before < plan.model_bytes / 2
