"""Programs of others against the server: langchain-openai, and lm-evaluation-harness."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest

import edge_memllm
from edge_memllm import Model, Sampling
from edge_memllm.evaluation.tasks import Scorer
from support.checkpoints import MakeArtifact
from support.server import MODEL_ID, TEMPLATE, Served, serving

HARNESS = importlib.util.find_spec("lm_eval") is not None
PAIRS = [
    ("The river ran", " down to the sea"),
    ("The river ran", " xyzzy"),
    ("Once upon a time", " there was"),
    ("\u00dcber", " allen Gipfeln"),
]
LIGHT = {
    "type": "object",
    "properties": {"on": {"type": "boolean"}},
    "required": ["on"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model(make_artifact: MakeArtifact) -> Iterator[Model]:
    with edge_memllm.load(make_artifact(), threads=1) as found:
        yield found


@pytest.fixture(scope="module")
def served(model: Model) -> Iterator[Served]:
    with serving(model, template=TEMPLATE) as found:
        yield found


@pytest.fixture(params=["chat", "responses"])
def protocol(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def chat(served: Served, protocol: str) -> Any:
    langchain = pytest.importorskip("langchain_openai")
    return langchain.ChatOpenAI(
        base_url=f"{served.url}/v1",
        api_key="x",
        model=MODEL_ID,
        temperature=0,
        max_tokens=12,
        use_responses_api=protocol == "responses",
    )


def test_langchain_asks_and_streams(chat: Any, model: Model, protocol: str) -> None:
    prompt = model.tokenizer.encode("[user]Hi[assistant]", special=False)
    expected = model.generate(prompt, max_new_tokens=12, sampling=Sampling())
    whole = chat.invoke("Hi")
    assert whole.text == expected
    assert whole.usage_metadata["output_tokens"] == 12
    told = whole.response_metadata
    if protocol == "responses":
        assert told["incomplete_details"] == {"reason": "max_output_tokens"}
    else:
        assert told["finish_reason"] == "length"
    assert "".join(part.text for part in chat.stream("Hi")) == expected
    assert [each.text for each in chat.batch(["Hi", "Hi"])] == [expected] * 2
    if protocol == "chat":  # responses have no `stop`: langchain leaves it out
        letter = expected[4]
        assert chat.invoke("Hi", stop=[letter]).text == expected.partition(letter)[0]


def test_langchain_gets_json_by_a_schema(chat: Any) -> None:
    schema = {
        "title": "thing",
        "type": "object",
        "properties": {"kind": {"enum": ["a", "b"]}, "on": {"type": "boolean"}},
        "required": ["kind", "on"],
        "additionalProperties": False,
    }
    chat.max_tokens = 60
    found = chat.with_structured_output(schema, method="json_schema").invoke("Hi")
    assert set(found) == {"kind", "on"}


def test_langchain_binds_a_tool(chat: Any) -> None:
    tool = {"type": "function", "function": {"name": "light", "parameters": LIGHT}}
    chat.max_tokens = 60
    bound = chat.bind_tools([tool], tool_choice="light")
    (call,) = bound.invoke("Hi").tool_calls
    assert call["name"] == "light"
    assert call["args"]["on"] in (True, False)
    whole = None
    for part in bound.stream("Hi"):
        whole = part if whole is None else whole + part
    assert whole.tool_calls[0]["args"] == call["args"]


@pytest.mark.parametrize("streamed", [False, True])
def test_langchain_hands_a_result_back(chat: Any, streamed: bool) -> None:
    messages = pytest.importorskip("langchain_core.messages")
    tool = {"type": "function", "function": {"name": "light", "parameters": LIGHT}}
    chat.max_tokens = 60
    bound = chat.bind_tools([tool], tool_choice="light")
    asked = messages.HumanMessage("Hi")
    if streamed:
        first, *further = bound.stream([asked])
        reply = sum(further, first)
    else:
        reply = bound.invoke([asked])
    (call,) = reply.tool_calls
    result = messages.ToolMessage("done", tool_call_id=call["id"])
    chat.max_tokens = 6
    answer = chat.bind_tools([tool], tool_choice="none").invoke([asked, reply, result])
    assert answer.usage_metadata["output_tokens"] == 6
    assert not answer.tool_calls


def test_langchain_knows_that_a_chat_is_too_long(chat: Any) -> None:
    base = pytest.importorskip("langchain_openai.chat_models.base")
    with pytest.raises(base.OpenAIContextOverflowError, match="maximum context length is 512"):
        chat.invoke("x " * 1000)


def test_langchain_completes(served: Served, model: Model) -> None:
    langchain = pytest.importorskip("langchain_openai")
    found = langchain.OpenAI(
        base_url=f"{served.url}/v1", api_key="x", model=MODEL_ID, temperature=0, max_tokens=8
    )
    expected = model.generate("The river", max_new_tokens=8, sampling=Sampling())
    assert found.invoke("The river") == expected


@pytest.mark.skipif(not HARNESS, reason="lm_eval is not installed: pip install lm-eval[api]")
def test_the_harness_scores_as_it_does_in_process(served: Served, model: Model) -> None:
    pytest.importorskip("tenacity", reason="lm_eval was installed without its extra api")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from edge_memllm.evaluation.harness import EdgeMemLM

    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(PAIRS)]
    over_http = LocalCompletionsAPI(
        base_url=f"{served.url}/v1/completions",
        model=MODEL_ID,
        tokenizer_backend="remote",
        batch_size=2,
    )
    found = over_http.loglikelihood(requests)
    expected = EdgeMemLM(model).loglikelihood(requests)
    for (value, greedy), (wanted, greedily) in zip(found, expected, strict=True):
        assert value == pytest.approx(wanted, abs=1e-4)
        assert greedy == greedily


def test_what_the_harness_asks_for(served: Served, model: Model) -> None:
    """The request and the reading of its reply, as `local-completions` has them."""
    pairs = [(model.tokenize(context), model.tokenize(end)) for context, end in PAIRS]
    body = {
        "model": MODEL_ID,
        "prompt": [context + end for context, end in pairs],
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    choices = served.post("/v1/completions", body).json()["choices"]
    with Scorer(model) as scorer:
        for choice, (context, end) in zip(choices, pairs, strict=True):
            scores = choice["logprobs"]["token_logprobs"]
            assert len(scores) == len(context) + len(end) + 1
            assert scores[0] is None
            (found,) = scorer.score(context, [end])
            assert sum(scores[len(context) : -1]) == pytest.approx(found.logprob, abs=1e-3)
