"""The endpoints around generating: models, overlays, health, metrics, tokens, the page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from starlette.applications import Starlette
from starlette.testclient import TestClient
from tokenizers import decoders, models

from edge_memllm import Model
from edge_memllm.overlays import Edit, OverlaySpec, overlay_of
from edge_memllm.server.application import POLICY, page_routes
from edge_memllm.text.token_texts import TokenTexts
from edge_memllm.text.tokenization import Tokenizer
from support.checkpoints import EOS, VOCABULARY
from support.server import HELLO, MODEL_ID, TEMPLATE, Served, serving, serving_small
from support.small_model import CONTEXT, byte_tokenizer, open_small_model


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    with serving_small(folder, template=TEMPLATE) as found:
        yield found


def test_paths_are_there_with_and_without_a_version(served: Served) -> None:
    for prefix in ("/v1", ""):
        assert served.get(f"{prefix}/models").json()["data"][0]["id"] == MODEL_ID
        assert served.get(f"{prefix}/models/{MODEL_ID}").json()["max_model_len"] == CONTEXT
        for path in ("/completions", "/chat/completions"):
            assert served.post(prefix + path, {}).status_code == 400
            assert served.get(prefix + path).status_code == 405
    assert served.get("/v1/models/a/b").status_code == 404
    assert served.get("/v1/models/").status_code == 404
    assert served.get("/v2/models").json()["error"]["type"] == "invalid_request_error"
    assert served.get("/v1/completions").headers["allow"] == "POST"


def test_tokens_and_back(served: Served) -> None:
    reply = served.post("/tokenize", {"prompt": "Hi \u00e9", "model": MODEL_ID}).json()
    assert reply["count"] == len(reply["tokens"]) == 5
    assert reply["max_model_len"] == CONTEXT
    back = served.post("/detokenize", {"tokens": reply["tokens"]})
    assert back.json() == {"prompt": "Hi \u00e9", "content": "Hi \u00e9"}
    bare = served.post("/tokenize", {"prompt": "x", "add_special_tokens": False}).json()
    assert bare["count"] == 1
    assert served.get("/tokenizer_info").json()["eos_token"] == "</s>"
    assert served.get("/tokenizer_info").json()["chat_template"] == TEMPLATE.source


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/tokenize", {}, "prompt is missing"),
        ("/tokenize", {"prompt": 1}, "prompt is 1, expected text"),
        ("/tokenize", {"prompt": "x", "add_special_tokens": 1}, "is 1, expected true or false"),
        ("/tokenize", {"prompt": "x", "content": "y"}, 'no parameter "prompt"'),
        ("/detokenize", {}, "tokens is missing"),
        ("/detokenize", {"tokens": "x"}, 'tokens is "x", expected a list'),
        ("/detokenize", {"tokens": [VOCABULARY]}, "Token 0 is 300, expected an integer"),
        ("/detokenize", {"tokens": [True]}, "Token 0 is True"),
    ],
)
def test_tokens_that_cannot_be(served: Served, path: str, body: object, message: str) -> None:
    response = served.post(path, body)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


def test_the_page_can_be_left_out(folder: Path) -> None:
    with serving_small(folder, page=False) as served:
        assert served.get("/").status_code == served.get("/page/main.js").status_code == 404
        assert served.get("/v1/models").status_code == 200


def test_health_ends_with_the_engine(folder: Path) -> None:
    with serving_small(folder) as served:
        assert served.get("/health").json()["status"] == "ok"
        served.engine.close()
        response = served.get("/health")
        assert (response.status_code, response.json()) == (503, {"status": "ended"})
        refused = served.post("/v1/completions", {"prompt": "x"})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "draining"
        assert int(refused.headers["retry-after"]) >= 1


SAMPLE = re.compile(r'([a-z_]+)(?:\{([a-z_]+="[^"\n]*"(?:,[a-z_]+="[^"\n]*")*)\})? (\S+)')


def test_metrics_are_prometheus_text(served: Served) -> None:
    served.complete(prompt="Hello", max_tokens=7)
    served.get("/" + "x" * 50)
    response = served.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    types: dict[str, str] = {}
    values: dict[str, float] = {}
    for line in response.text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            assert name not in types
            types[name] = kind
        elif not line.startswith("# HELP "):
            match = SAMPLE.fullmatch(line)
            assert match, line
            family = re.sub(r"_(bucket|sum|count)$", "", match[1])
            assert match[1] in types or types[family] == "histogram"
            values[line.rpartition(" ")[0]] = float(match[3])
    assert values["edge_memllm_completion_tokens_total"] >= 7
    assert values["edge_memllm_prompt_tokens_total"] >= 5
    assert values["edge_memllm_slots"] == 4
    assert values["edge_memllm_table_read_bytes_total"] > 0
    assert values['edge_memllm_http_requests_total{path="other",status="404"}'] >= 1
    assert values['edge_memllm_first_token_seconds_bucket{le="+Inf"}'] >= 1
    assert "xxxx" not in response.text  # paths that clients make up are not counted by name


def test_the_speed_is_that_of_the_last_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    from edge_memllm.server import service as metrics

    now = 100.0
    monkeypatch.setattr(metrics, "monotonic", lambda: now)
    speed = metrics.Speed()
    for second in range(30):
        now = 100.0 + second
        for _ in range(second):
            speed.note()
    now = 130.0
    assert speed.value() == sum(range(20, 30)) / 10
    now = 135.0
    assert speed.value() == sum(range(25, 30)) / 10
    now = 200.0
    assert speed.value() == 0


def overlaid(model: Model, name: str, token: int) -> None:
    """Load an overlay that blanks a token's rows."""
    spec = OverlaySpec.for_model(model.manifest, name)
    edits = [Edit(token, layer, "blank") for layer in range(spec.layers)]
    model.add_overlay(overlay_of(spec, edits))


def test_overlays_are_listed_and_chosen_for_each_request(folder: Path) -> None:
    with open_small_model(folder) as model:
        (token,) = model.tokenize("H")
        overlaid(model, "quiet", token)
        overlaid(model, "other", token + 1)
        wanted = {"prompt": "H", "max_tokens": 20, "temperature": 0, "ignore_eos": True}
        expected = {
            names: model.generate("H", max_new_tokens=20, ignore_eos=True, overlays=names)
            for names in (None, (), ("quiet",))
        }
        with serving(model) as served:
            listed = served.get("/v1/overlays").json()
            assert [each["id"] for each in listed["data"]] == ["quiet", "other"]
            for names, text in expected.items():
                given = {} if names is None else {"overlays": list(names)}
                reply = served.complete(**wanted, **given, statistics=True)["choices"][0]
                assert reply["text"] == text
                on = ["quiet", "other"] if names is None else list(names)
                assert reply["statistics"]["overlays"] == on
            refused = served.refusal(prompt="x", overlays=["loud"])
            assert refused["message"] == 'There is no overlay "loud". Loaded: quiet, other.'
            assert served.refusal(prompt="x", overlays=["quiet", "quiet"])["param"] == "overlays"
    assert expected[()] != expected[("quiet",)]


def test_the_page_is_served_under_a_strict_policy(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("<!doctype html>", encoding="utf-8")
    (tmp_path / "page.js").write_text("'use strict';", encoding="utf-8")
    (tmp_path / "__init__.py").write_text("secret", encoding="utf-8")
    with TestClient(Starlette(routes=list(page_routes(tmp_path)))) as client:
        page = client.get("/")
        assert page.text == "<!doctype html>"
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert page.headers["content-security-policy"] == POLICY
        assert "unsafe" not in POLICY
        script = client.get("/page/page.js")
        assert script.headers["content-type"] == "text/javascript; charset=utf-8"
        again = client.get("/page/page.js", headers={"if-none-match": script.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        for path in ("/page/__init__.py", "/page/", "/page/../page.py", "/page/%2e%2e/x"):
            assert client.get(path).status_code == 404


def test_bytes_of_tokens_whatever_the_vocabulary() -> None:
    """Byte-level, as GPT-2's; and words with a mark for the space, and bytes by their number."""
    letters = TokenTexts(byte_tokenizer(), VOCABULARY)
    ids = byte_tokenizer().encode("\u00e9!")
    assert [letters.utf8(token) for token in ids] == [b"\xc3", b"\xa9", b"!"]
    assert letters.utf8(EOS) == b"</s>"
    assert letters.utf8(VOCABULARY - 1) == b""  # beyond what the tokenizer knows
    words = {"\u2581the": 0, "<0xC3>": 1, "\u00e9": 2, "<unk>": 3}
    made = tokenizers.Tokenizer(models.BPE(words, [], byte_fallback=True, unk_token="<unk>"))
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    texts = TokenTexts(Tokenizer(made.to_str().encode()), 4)
    assert [texts.utf8(token) for token in range(3)] == [b" the", b"\xc3", b"\xc3\xa9"]


def test_every_response_forbids_sniffing(served: Served) -> None:
    for path in ("/health", "/nothing", "/v1/models"):
        assert served.get(path).headers["x-content-type-options"] == "nosniff"
        assert "server" not in served.get(path).headers


@pytest.mark.parametrize("name", ["abc-1", "2f9a/8:1.0", "x" * 128])
def test_a_request_has_the_name_its_client_gave_it(served: Served, name: str) -> None:
    for path in ("/health", "/nothing", "/v1/models"):
        assert served.get(path, headers={"x-request-id": name}).headers["x-request-id"] == name
    response = served.post("/v1/completions", {"prompt": 3}, headers={"X-Request-ID": name})
    assert response.headers["x-request-id"] == response.json()["error"]["request_id"] == name


@pytest.mark.parametrize("name", ["", "a b", "x" * 129, 'a"b', "a;b", "\u00e4".encode()])
def test_a_request_without_a_good_name_gets_one(served: Served, name: str | bytes) -> None:
    names = {
        served.get("/health", headers={"x-request-id": name}).headers["x-request-id"]
        for _ in range(3)
    }
    assert len(names) == 3
    assert all(re.fullmatch("req_[0-9a-f]{32}", each) for each in names)


def test_what_is_not_the_clients_fault_is_logged_under_its_name(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(type(served.engine), "submit", fail)
    response = served.post("/v1/completions", {"prompt": "x"}, headers={"x-request-id": "abc-7"})
    assert response.status_code == 500
    assert response.json()["error"]["request_id"] == "abc-7"
    assert "abc-7: the request failed" in caplog.text


def test_end_of_text_tokens_count_and_are_scored(served: Served) -> None:
    """A client that cuts off the last score must not cut off one of the prompt's."""
    bias = {str(EOS): 100}
    reply = served.complete(prompt="Hello", max_tokens=1, logit_bias=bias, logprobs=1, echo=True)
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["choices"][0]["text"] == "Hello"
    assert len(reply["choices"][0]["logprobs"]["token_logprobs"]) == 6
    assert reply["usage"]["completion_tokens"] == 1
    assert np.isfinite(reply["choices"][0]["logprobs"]["token_logprobs"][-1])


def test_a_chat_becomes_a_prompt_and_its_tokens(folder: Path) -> None:
    with serving_small(folder, template=TEMPLATE) as served:
        begun = [*HELLO, {"role": "assistant", "content": "I"}]
        body = {"messages": begun, "continue_final_message": True}
        prompt = served.post("/apply-template", body).json()["prompt"]
        assert prompt == "[user]Hi[assistant]I"
        counted = served.post("/tokenize", body).json()
        assert counted["count"] == len(counted["tokens"]) == len(prompt)
        back = served.post("/detokenize", {"tokens": counted["tokens"]}).json()
        assert back["prompt"] == prompt
        assert served.refusal("/apply-template", messages=[])["param"] == "messages"
        alone = {**body, "add_generation_prompt": False}
        assert prompt.startswith(served.post("/apply-template", alone).json()["prompt"])
        assert not served.post("/apply-template", alone).json()["prompt"].endswith("[assistant]")
        both = served.refusal("/tokenize", messages=HELLO, prompt="x")
        assert both["param"] == "prompt"


def test_embeddings_are_refused_with_the_reason(folder: Path) -> None:
    with serving_small(folder) as served:
        for path in ("/v1/embeddings", "/embedding"):
            error = served.refusal(path, input="x")
            assert error["code"] == "unsupported_endpoint"
            assert "Ask a server that has a model for embeddings." in error["message"]


def test_a_model_may_have_other_names(folder: Path) -> None:
    with serving_small(folder, aliases=("gpt-4o-mini",)) as served:
        listed = served.get("/v1/models").json()["data"]
        assert [each["id"] for each in listed] == [MODEL_ID, "gpt-4o-mini"]
        assert served.get("/v1/models/gpt-4o-mini").json()["id"] == "gpt-4o-mini"
        assert served.complete(model="gpt-4o-mini", max_tokens=1)["model"] == MODEL_ID
        refused = served.post("/v1/completions", {"model": "gpt-9", "prompt": "x"})
        assert refused.status_code == 404
