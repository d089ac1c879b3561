"""`keep_alive`: how long a model stays behind a request, in Ollama's words."""

from __future__ import annotations

import math
from pathlib import Path
from time import monotonic
from typing import Any

import httpx
import pytest

from edge_memllm.server.fields import ApiError, BodyFields
from edge_memllm.server.models import ServedModels
from edge_memllm.server.protocols.keep_alive import take_keep_alive
from edge_memllm_runtimes.fake import FakeRuntime
from support.checkpoints import VOCABULARY
from support.engine import wait_until
from support.server import TEMPLATE, Served, chat, complete, message, respond, serving_small
from support.several_models import Home, served
from support.small_model import CONTEXT, write_small_artifact


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (0, 0.0),
        (30, 30.0),
        (1.5, 1.5),
        (-1, math.inf),
        ("-1", math.inf),
        ("-1m", math.inf),
        ("0", 0.0),
        ("5m", 300.0),
        ("1h30m", 5400.0),
        ("1.5h", 5400.0),
        ("250ms", 0.25),
        (None, None),
    ],
)
def test_it_is_read_as_ollama_does(value: object, seconds: float | None) -> None:
    assert take_keep_alive(BodyFields({"keep_alive": value})) == seconds


@pytest.mark.parametrize("value", ["5", "five", "5 m", "m", "", True, [], math.nan, math.inf, {}])
def test_what_is_no_time_is_refused(value: Any) -> None:
    with pytest.raises(ApiError, match=r"keep_alive is .*, expected seconds, a duration like '5m'"):
        take_keep_alive(BodyFields({"keep_alive": value}))


def ask(url: str, model: str, **more: Any) -> httpx.Response:
    body = {"prompt": "Hello", "max_tokens": 2, "model": model, **more}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=30)


def state(url: str, name: str) -> str:
    found: str = httpx.get(f"{url}/v1/models/{name}").json()["state"]
    return found


def test_a_request_frees_its_model_at_once_or_keeps_it(folder: Path) -> None:
    home = Home(folder)
    with served(home.models(idle=0.05)) as url:
        assert ask(url, "b", keep_alive=-1).status_code == 200
        for _ in range(2):
            ask(url, "a", keep_alive=0)
            wait_until(lambda: state(url, "a") == "unloaded")
        assert state(url, "b") == "loaded"
        ask(url, "b")  # the last to end counts, and it says nothing
        wait_until(lambda: state(url, "b") == "unloaded")
    assert home.opened == ["b", "a", "a"]


def test_it_holds_without_a_time_for_all(folder: Path) -> None:
    home = Home(folder)
    with served(home.models()) as url:
        ask(url, "b")
        begun = monotonic()
        ask(url, "a", keep_alive="300ms")
        wait_until(lambda: state(url, "a") == "unloaded")
        assert monotonic() - begun >= 0.3
        assert state(url, "b") == "loaded"


def test_one_that_is_kept_still_makes_room(folder: Path) -> None:
    home = Home(folder)
    with served(home.models(room=1)) as url:
        ask(url, "a", keep_alive=-1)
        assert ask(url, "b").status_code == 200
        assert (state(url, "a"), state(url, "b")) == ("unloaded", "loaded")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = write_small_artifact(tmp_path_factory.mktemp("artifact") / "a").path
    with serving_small(folder, FakeRuntime(VOCABULARY, CONTEXT), template=TEMPLATE) as found:
        yield found


def test_a_server_that_keeps_its_model_says_so(small: Served) -> None:
    error = small.refusal(prompt="a", keep_alive="5m")
    assert error["param"] == "keep_alive"
    assert "300 s, and this server keeps its model" in error["message"]
    small.complete(keep_alive=-1, max_tokens=1)


@pytest.mark.parametrize("read", [complete, chat, respond, message])
def test_every_protocol_has_it(read: Any, small: Served) -> None:
    assert read(small.service, keep_alive="1m").keep_alive == 60.0


def test_models_of_one_that_is_loaded_are_never_freed(small: Served) -> None:
    models = ServedModels.of(small.service)
    models.keep(models.all[0], math.inf)
    with pytest.raises(ApiError, match="keep_alive is 0 s, and this server keeps its model"):
        models.keep(models.all[0], 0.0)
