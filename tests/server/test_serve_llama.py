"""llama.cpp's own `/completion`, and what it tells of itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_memllm.server.service import Service
from edge_memllm_runtimes.fake import FakeRuntime
from support.checkpoints import BOS, EOS, VOCABULARY
from support.server import (
    HELLO,
    MODEL_ID,
    TEMPLATE,
    Served,
    llama,
    refusal,
    serving_small,
)
from support.small_model import CONTEXT, write_small_artifact

PATH = "/completion"
BIG, SMALL = 39, 72  # H and i: tokens of the byte-level vocabulary
GREEDY: dict[str, Any] = {"temperature": 0, "n_predict": 6}
TIMES = {"cache_n", "prompt_n", "prompt_ms", "prompt_per_token_ms", "prompt_per_second"}
TIMES |= {"predicted_n", "predicted_ms", "predicted_per_token_ms", "predicted_per_second"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_artifact(tmp_path_factory.mktemp("artifact") / "a").path


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    runtime = FakeRuntime(VOCABULARY, CONTEXT)
    with serving_small(folder, runtime, template=TEMPLATE, engine={"prefill_chunk": 4}) as found:
        yield found


def completed(served: Served, **body: Any) -> Any:
    response = served.post(PATH, {"prompt": "Hello", **GREEDY, **body})
    assert response.status_code == 200, response.text
    return response.json()


def test_it_is_openais_completion_in_other_words(served: Served) -> None:
    other = served.complete(temperature=0, max_tokens=6, ignore_eos=True)
    found = completed(served, return_tokens=True)
    assert found["content"] == other["choices"][0]["text"]
    assert len(found["tokens"]) == found["tokens_predicted"] == 6
    assert (found["stop_type"], found["stopping_word"], found["truncated"]) == ("limit", "", False)
    assert found["has_new_line"] == ("\n" in found["content"])
    assert (found["prompt"], found["tokens_evaluated"]) == ("Hello", 5)
    assert found["model"] == MODEL_ID
    assert found["generation_settings"]["n_predict"] == 6
    assert {*found["timings"]} == TIMES
    assert found["timings"]["cache_n"] + found["timings"]["prompt_n"] == 5
    assert completed(served)["tokens"] == []


def test_a_stream_has_a_token_each_and_then_the_rest(served: Served) -> None:
    *parts, last = served.events(PATH, prompt="Hello", **GREEDY)
    whole = completed(served, return_tokens=True)
    assert [token for part in parts for token in part["tokens"]] == whole["tokens"]
    assert "".join(part["content"] for part in parts) == whole["content"]
    assert [part["tokens_predicted"] for part in parts] == [1, 2, 3, 4, 5, 6]
    assert not any(part["stop"] for part in parts)
    assert last["stop"]
    assert (last["content"], last["tokens"], last["stop_type"]) == ("", [], "limit")
    assert last["generation_settings"]["stream"] is True


def test_what_ends_a_text_is_told(served: Served) -> None:
    text = completed(served)["content"]
    word = completed(served, stop=[text[2:4]])
    assert (word["stop_type"], word["stopping_word"]) == ("word", text[2:4])
    assert word["content"] == text[: text.index(text[2:4])]
    *_, last = served.events(PATH, prompt="Hello", **GREEDY, stop=[text[2:4]])
    assert (last["stop_type"], last["stopping_word"]) == ("word", text[2:4])
    ended = completed(served, logit_bias=[[EOS, 100]])
    assert (ended["stop_type"], ended["content"]) == ("eos", "")
    named = completed(served, logit_bias=[[EOS, 100]], stop=["</s>"])
    assert (named["stop_type"], named["stopping_word"]) == ("word", "</s>")


def test_a_text_may_be_as_long_as_the_context(served: Served) -> None:
    found = completed(served, n_predict=-1, ignore_eos=True)
    assert found["tokens_predicted"] == CONTEXT - 5 + 1
    assert found["truncated"] is True
    assert found["generation_settings"]["logit_bias"] == [{"token": EOS, "bias": None}]
    assert completed(served, n_predict=0)["tokens_predicted"] == 0


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("Hi", [[BIG, SMALL]]),
        ([BIG, SMALL], [[BIG, SMALL]]),
        ([BIG, "i", 3], [[BIG, SMALL, 3]]),
        ({"prompt_string": "Hi"}, [[BIG, SMALL]]),
        (["Hi", [BIG]], [[BIG, SMALL], [BIG]]),
        ([[BIG, "i"], {"prompt_string": "H"}], [[BIG, SMALL], [BIG]]),
    ],
)
def test_prompts_are_texts_tokens_or_both(service: Service, prompt: Any, ids: Any) -> None:
    assert [*llama(service, prompt=prompt).prompts] == ids


def test_several_prompts_are_a_list(served: Served) -> None:
    single = completed(served)
    tokens = served.service.model.tokenizer.encode("Hello")
    first, second = completed(served, prompt=["Hello", tokens])
    assert first["content"] == second["content"] == single["content"]
    assert (first["index"], second["index"]) == (0, 1)
    (only,) = completed(served, prompt=["Hello"])
    assert only["content"] == single["content"]


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"prompt": 5}, "prompt", "prompt is 5, expected text"),
        ({"prompt": []}, "prompt", "expected a prompt, or a list of 1 to 4"),
        ({"prompt": [[]]}, "prompt\\[0\\]", "is a list of 0, expected text"),
        ({"prompt": [1, 999]}, "prompt\\[1\\]", "999, expected an integer from 0"),
        ({"prompt": {"text": "x"}}, "prompt.prompt_string", "is missing"),
        (
            {"prompt": {"prompt_string": "x", "multimodal_data": ["y"]}},
            "prompt.multimodal_data",
            "not understood",
        ),
        ({"n_probs": 101}, "n_probs", "expected an integer from 0 to 100"),
        ({"response_fields": [1]}, "response_fields\\[0\\]", "is 1, expected text"),
        ({"max_tokens": 4}, "max_tokens", "no parameter"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    service: Service, body: Any, param: str, message: str
) -> None:
    error = refusal(llama, service, **body)
    assert str(error.param) == param.replace("\\", "")
    assert message in str(error)


def test_likelihoods_are_the_models_or_those_drawn_with(served: Served) -> None:
    found = completed(served, n_probs=3)["completion_probabilities"]
    assert len(found) == 6
    for each in found:
        assert len(each["top_logprobs"]) == 3
        assert each["top_logprobs"][0]["id"] == each["id"]
        assert each["logprob"] == pytest.approx(each["top_logprobs"][0]["logprob"])
        assert each["logprob"] < 0
    chosen = {"n_probs": 3, "post_sampling_probs": True}
    (first, *_) = completed(served, **chosen)["completion_probabilities"]
    assert first["prob"] == 1.0  # greedy: nothing else could come
    assert [each["id"] for each in first["top_probs"]] == [first["id"]]
    two = {**chosen, "temperature": 1, "top_k": 2, "seed": 3}
    for each in completed(served, **two)["completion_probabilities"]:
        assert sum(top["prob"] for top in each["top_probs"]) == pytest.approx(1)
        assert each["prob"] in [top["prob"] for top in each["top_probs"]]
        assert len(each["top_probs"]) == 2
    for part in served.events(PATH, prompt="Hello", **GREEDY, n_probs=2)[:-1]:
        assert len(part["completion_probabilities"]) == 1


def test_only_fields_that_are_asked_for(served: Served) -> None:
    wanted = ["content", "generation_settings/n_predict", "timings/prompt_n", "nothing"]
    found = completed(served, response_fields=wanted)
    assert {*found} == {*wanted[:3]}
    assert found["generation_settings/n_predict"] == 6


def test_biases_by_text_and_false_forbids(served: Served) -> None:
    text = completed(served, n_predict=60)["content"]
    letter = next(each for each in text if each.isascii())
    (token,) = served.service.model.tokenizer.encode(letter)
    without = completed(served, logit_bias=[[letter, False]], n_predict=60)["content"]
    assert letter not in without
    assert completed(served, n_predict=60, logit_bias={letter: -100})["content"] == without
    assert completed(served, n_predict=60, logit_bias={str(token): -100})["content"] == without
    assert completed(served, n_predict=60, logit_bias=[[token, -100]])["content"] == without


def test_an_unsaid_seed_is_drawn(served: Served) -> None:
    seeds = {completed(served, seed=-1)["generation_settings"]["seed"] for _ in range(3)}
    assert len(seeds) == 3
    assert completed(served, seed=7)["generation_settings"]["seed"] == 7


def test_progress_comes_before_and_after_each_chunk(served: Served) -> None:
    body = {"prompt": "A rather long one", **GREEDY, "return_progress": True}
    for first in (0, None):
        told = served.events(PATH, **body, cache_prompt=first is None, timings_per_token=True)
        steps = [each["prompt_progress"] for each in told if "prompt_progress" in each]
        done = [each["processed"] for each in steps]
        reused = steps[0]["cache"]
        assert reused == (0 if first == 0 else 16)  # all but the last token
        assert done == [*range(reused, 17, 4), 17][: len(done)]
        assert done[-1] == 17
        assert {each["total"] for each in steps} == {17}
        assert {each["cache"] for each in steps} == {reused}
        assert steps[0]["time_ms"] == told[0]["timings"]["prompt_ms"] == 0
        assert [*map(len, (each["timings"] for each in told))] == [len(TIMES)] * len(told)
        counted = [each["timings"]["predicted_n"] for each in told[len(steps) : -1]]
        assert counted == [1, 2, 3, 4, 5, 6]


def test_a_prompt_may_be_computed_whole(served: Served) -> None:
    completed(served, prompt="Again and again")
    assert completed(served, prompt="Again and again")["timings"]["cache_n"] == 14
    fresh = completed(served, prompt="Again and again", cache_prompt=False)
    assert fresh["timings"]["cache_n"] == 0
    assert fresh["timings"]["prompt_n"] == 15


def test_speed_is_that_of_tokens_behind_the_first(served: Served) -> None:
    one = completed(served, n_predict=1)["timings"]
    assert one["predicted_per_second"] == one["predicted_per_token_ms"] == 0
    many = completed(served, n_predict=9)["timings"]
    assert many["predicted_per_second"] == pytest.approx(8e3 / many["predicted_ms"])
    assert all(value >= 0 for value in many.values())


def test_chats_tell_it_too(served: Served) -> None:
    body = {"messages": HELLO, "max_tokens": 3, "temperature": 0, "ignore_eos": True}
    whole = served.post("/v1/chat/completions", {**body, "verbose": True}).json()
    assert {*whole["timings"]} == TIMES
    assert whole["__verbose"]["prompt"] == "[user]Hi[assistant]"
    assert whole["__verbose"]["content"] == whole["choices"][0]["message"]["content"]
    asked = {**body, "return_progress": True, "timings_per_token": True}
    parts = served.events("/v1/chat/completions", **asked)[:-1]
    assert "timings" not in parts[0]  # the opening
    progress = [part["prompt_progress"] for part in parts if "prompt_progress" in part]
    assert progress[-1]["processed"] == progress[-1]["total"] == len("[user]Hi[assistant]")
    assert all("timings" in part for part in parts[1:])
    said, end = parts[-2:]
    assert said["choices"][0]["finish_reason"] is None
    assert end["choices"][0]["delta"] == {}
    assert end["choices"][0]["finish_reason"] == "length"
    plain = served.events("/v1/chat/completions", **body)[:-1]
    assert [each for each in plain if "prompt_progress" in each] == []
    assert [place for place, each in enumerate(plain) if "timings" in each] == [len(plain) - 1]


def test_tokens_in_its_words(served: Served) -> None:
    said = {"content": "Hé"}
    ids = served.service.model.tokenizer.encode("Hé")
    assert served.post("/tokenize", said).json() == {"tokens": ids}
    pieces = served.post("/tokenize", {**said, "with_pieces": True}).json()["tokens"]
    assert pieces == [
        {"id": ids[0], "piece": "H"},
        {"id": ids[1], "piece": [0xC3]},
        {"id": ids[2], "piece": [0xA9]},
    ]
    count = served.post("/v1/chat/completions/input_tokens", {"messages": HELLO}).json()
    assert count["input_tokens"] == len("[user]Hi[assistant]")


def test_what_it_tells_of_itself(served: Served) -> None:
    props = served.get("/props").json()
    assert props["default_generation_settings"]["n_ctx"] == CONTEXT
    assert props["default_generation_settings"]["params"]["n_predict"] == -1
    assert props["total_slots"] == 4
    assert props["chat_template"] == TEMPLATE.source
    assert (props["bos_token"], props["eos_token"]) == ("<s>", "</s>")
    assert props["is_sleeping"] is False
    assert served.service.model.tokenizer.spelling(BOS) == "<s>"
    served.settled()
    slots = served.get("/slots").json()
    assert [each["is_processing"] for each in slots] == [False] * 4
    assert "Hello" not in json.dumps(slots)
    assert served.get("/props", params={"model": "other"}).status_code == 404


def test_a_prompt_that_is_too_long_is_told_with_its_numbers(served: Served) -> None:
    error = served.refusal(PATH, prompt="x" * (CONTEXT + 1))
    assert error["type"] == "exceed_context_size_error"
    assert (error["n_prompt_tokens"], error["n_ctx"]) == (CONTEXT + 1, CONTEXT)
    assert "exceeds the available context size" in error["message"]
