"""Drafts over HTTP: for all requests, for one, and what is told of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_memllm.server.service import Service
from support.engine import GatedRuntime
from support.server import TEMPLATE, Served, chat, complete, llama, message, respond, serving_small
from support.small_model import write_small_artifact

READERS: Any = (complete, chat, respond, message, llama)
ASKED: dict[str, Any] = {"max_tokens": 40, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_artifact(tmp_path_factory.mktemp("artifact") / "a").path


@pytest.fixture
def runtime() -> GatedRuntime:
    return GatedRuntime(answers=1)


@pytest.fixture
def served(folder: Path, runtime: GatedRuntime) -> Iterator[Served]:
    with serving_small(folder, runtime, template=TEMPLATE, speculate=8, seed=5) as found:
        yield found


def test_a_reply_is_the_same_with_drafts_and_takes_fewer_steps(
    served: Served, runtime: GatedRuntime
) -> None:
    plain = served.complete(speculate=0, statistics=True, **ASKED)
    steps = len(runtime.steps)
    drafted = served.complete(cache_prompt=False, statistics=True, **ASKED)
    assert drafted["choices"][0]["text"] == plain["choices"][0]["text"]
    assert len(runtime.steps) - steps < steps / 2
    assert "draft_n" not in plain["timings"]
    timings, told = drafted["timings"], drafted["choices"][0]["statistics"]
    assert 20 < timings["draft_n_accepted"] <= timings["draft_n"]
    assert (told["draft_tokens"], told["shared_steps"]) == (timings["draft_n"], 0)
    metrics = served.get("/metrics").text
    assert f"edge_memllm_draft_tokens_total {timings['draft_n']}" in metrics
    assert f"edge_memllm_accepted_tokens_total {timings['draft_n_accepted']}" in metrics


def test_choices_share_their_steps_and_say_that_nothing_was_drafted(served: Served) -> None:
    reply = served.complete(n=2, statistics=True, **ASKED)
    for each in reply["choices"]:
        assert each["statistics"]["draft_tokens"] == 0
        assert each["statistics"]["shared_steps"] > 30


@pytest.mark.parametrize("read", READERS)
def test_every_protocol_has_its_switch_and_the_usual(read: Any, served: Served) -> None:
    service = served.service
    assert read(service).request.speculate == 8
    assert read(service, speculate=0).request.speculate == 0
    assert read(service, **{"speculative.n_max": 3}).request.speculate == 3
    assert read(service).request.seed == 5
    assert read(service, seed=6).request.seed == 6


def test_llama_words_tell_the_usual(served: Served) -> None:
    params = served.get("/props").json()["default_generation_settings"]["params"]
    assert (params["seed"], params["speculative.n_max"]) == (5, 8)
    assert served.get("/slots").json()[0]["speculative"] is True


def test_what_cannot_be_is_refused_by_name(served: Served) -> None:
    error = served.refusal(prompt="a", speculate=2, **{"speculative.n_max": 3})
    assert "speculate is 2 and speculative.n_max is 3" in error["message"]
    error = served.refusal(prompt="a", speculate=65)
    assert "speculate is 65, expected an integer from 0 to 64" in error["message"]
    error = served.refusal(prompt="a", **{"speculative.p_min": 0.5})
    assert error["param"] == "speculative.p_min"
    served.complete(max_tokens=1, **{"speculative.p_min": 0})


def test_without_the_option_nothing_is_drafted(service: Service) -> None:
    assert complete(service).request.speculate == 0
    assert complete(service).request.seed is None
