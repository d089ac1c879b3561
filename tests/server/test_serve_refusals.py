"""Completions that are refused: each names its field and says what was expected."""

from __future__ import annotations

import re
from typing import Any

import pytest

from edge_memllm.server.service import Service
from support.checkpoints import VOCABULARY
from support.server import HELLO, complete, refusal

NO_SCHEMA = {"name": "a", "schema": 1}


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"prompt": None}, "prompt", "prompt is missing."),
        ({"prompt": []}, "prompt", "prompt is a list of 0, expected a text, a list of token ids"),
        ({"prompt": {}}, "prompt", "prompt is an object, expected a text"),
        ({"prompt": [[]]}, "prompt[0]", r"prompt\[0\] is a list of no tokens"),
        ({"prompt": ["a", None]}, "prompt[1]", r"prompt\[1\] is null, expected text"),
        (
            {"prompt": [VOCABULARY]},
            "prompt",
            "Token 0 is 300, expected an integer from 0 to 299",
        ),
        ({"prompt": [-1]}, "prompt", "Token 0 is -1"),
        ({"prompt": [True]}, "prompt", "Token 0 is True"),
        ({"prompt": [[1.5]]}, "prompt[0]", "Token 0 is 1.5"),
        ({"prompt": [[2**70]]}, "prompt[0]", "Token 0 is a huge integer"),
        ({"prompt": ["a"] * 5}, "prompt", "prompt holds 5 prompts, expected at most 4"),
        ({"prompt": ["a"] * 3, "n": 2}, "prompt", "holds 3 prompts, expected at most 2"),
        ({"prompt": [1.0, 2]}, "prompt", "Token 0 is 1.0"),
        (
            {"prompt": "a" * 101},
            "prompt",
            "length is 128 tokens, and this server takes prompts of at most 100. However, your",
        ),
        ({"prompt": "a" * 200}, "prompt", "resulted in 200 tokens"),
        ({"prompt": "\ud800"}, "prompt", "half of a surrogate pair"),
        ({"model": 3}, "model", "model is 3, expected text"),
        ({"n": 0}, "n", "n is 0, expected an integer from 1 to 4"),
        ({"n": 5}, "n", "n is 5, expected an integer from 1 to 4"),
        ({"n": True}, "n", "n is true, expected an integer"),
        ({"n": 1.5}, "n", "n is 1.5, expected an integer"),
        ({"n": 10**30}, "n", "n is an integer beyond 64 bits"),
        ({"best_of": 3}, "best_of", "best_of is 3 and n is 1: this server does not choose among"),
        ({"max_tokens": 51}, "max_tokens", "max_tokens is 51, expected an integer from 0 to 50"),
        ({"max_tokens": -1}, "max_tokens", "max_tokens is -1"),
        ({"max_tokens": "9"}, "max_tokens", 'max_tokens is "9", expected an integer'),
        ({"temperature": 2.1}, "temperature", "temperature is 2.1, expected a number from 0 to 2"),
        ({"temperature": "hot"}, "temperature", 'temperature is "hot", expected a number'),
        ({"top_p": -0.1}, "top_p", "top_p is -0.1, expected a number from 0 to 1"),
        ({"top_k": -2}, "top_k", "top_k is -2, expected an integer from -1"),
        ({"min_p": 2}, "min_p", "min_p is 2"),
        ({"repetition_penalty": 0}, "repetition_penalty", "repetition_penalty is 0"),
        ({"frequency_penalty": 3}, "frequency_penalty", "is 3, expected a number from -2 to 2"),
        ({"presence_penalty": []}, "presence_penalty", "is a list of 0, expected a number"),
        ({"seed": 2**64}, "seed", "seed is an integer beyond 64 bits"),
        ({"seed": "x"}, "seed", 'seed is "x", expected an integer'),
        ({"stop": 3}, "stop", "stop is 3, expected a text or at most 3"),
        ({"stop": ["a"] * 4}, "stop", "stop is a list of 4, expected a text or at most 3"),
        ({"stop": [""]}, "stop", "stop has an empty text"),
        ({"stop": [7]}, "stop[0]", r"stop\[0\] is 7, expected text"),
        ({"stop": "a" * 5000}, "stop[0]", "has 5000 characters, expected at most 4096"),
        ({"logit_bias": 1}, "logit_bias", "logit_bias is 1, expected an object"),
        ({"logit_bias": [1]}, "logit_bias[0]", "is 1, expected a token and its bias"),
        ({"logit_bias": [["a", 1]]}, "logit_bias", 'the entry "a", expected token numbers from 0'),
        ({"logit_bias": [[7, 101]]}, "logit_bias.7", "is 101, expected a number from -100 to 100"),
        ({"repeat_penalty": 2, "repetition_penalty": 3}, "repeat_penalty", "Give one of them"),
        ({"max_tokens": 2, "n_predict": 3}, "max_tokens", "n_predict is 3. Give one of them"),
        ({"logit_bias": {"x": 1}}, "logit_bias", 'the entry "x", expected token numbers'),
        ({"logit_bias": {"300": 1}}, "logit_bias", 'the entry "300"'),
        ({"logit_bias": {"-1": 1}}, "logit_bias", 'the entry "-1"'),
        ({"logit_bias": {"01": 1}}, "logit_bias", 'the entry "01"'),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias", "the entry"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1", "is 101, expected a number from -100 to 100"),
        ({"logit_bias": {"1": 1, "2": 1, "3": 1}}, "logit_bias", "at most 2 entries"),
        ({"logprobs": 21}, "logprobs", "logprobs is 21, expected an integer from 0 to 20"),
        ({"logprobs": True}, "logprobs", "logprobs is true"),
        ({"echo": 1}, "echo", "echo is 1, expected true or false"),
        ({"stream": "yes"}, "stream", 'stream is "yes", expected true or false'),
        (
            {"stream_options": {"include_usage": True}},
            "stream_options",
            "stream_options is for streams",
        ),
        (
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            "stream_options.continuous_usage_stats",
            "continuous_usage_stats needs include_usage true",
        ),
        ({"stop_token_ids": [300]}, "stop_token_ids", "Token 0 is 300, expected an integer from 0"),
        ({"stop_token_ids": 3}, "stop_token_ids", "stop_token_ids is 3, expected a list"),
        ({"stop_token_ids": [1] * 4}, "stop_token_ids", "is a list of 4, expected a list of at"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
            "stream_options.include_obfuscation is not supported",
        ),
        (
            {"stream": True, "stream_options": {"more": 1}},
            "stream_options.more",
            'There is no parameter "stream_options.more"',
        ),
        ({"suffix": "x"}, "suffix", "suffix is not supported by this server: nothing is filled in"),
        ({"overlays": "a"}, "overlays", 'overlays is "a", expected a list'),
        ({"overlays": ["a"]}, "overlays", 'no overlay "a". Loaded: none'),
        ({"metadata": {"a": 1}}, "metadata.a", "metadata.a is 1, expected text"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "metadata", "at most 16 entries"),
        ({"user": 5}, "user", "user is 5, expected text"),
        ({"temprature": 1}, "temprature", 'no parameter "temprature". Leave it out'),
        ({"\x1b[31m\r\n": 1}, "\x1b[31m\r\n", r'no parameter "\\u001b\[31m\\r\\n"'),
        ({"messages": HELLO}, "messages", 'no parameter "messages"'),
        ({"response_format": "json"}, "response_format", 'is "json", expected an object'),
        ({"response_format": {}}, "response_format.type", "response_format.type is missing"),
        (
            {"response_format": {"type": "xml"}},
            "response_format.type",
            "expected 'text' or 'json_o",
        ),
        (
            {"response_format": {"type": "json_schema"}},
            "response_format.json_schema",
            "response_format.json_schema is missing",
        ),
        (
            {"response_format": {"type": "json_object", "json_schema": {"name": "x"}}},
            "response_format.json_schema",
            "no parameter",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a b"}}},
            "response_format.json_schema.name",
            "expected 1 to 64 letters, digits, underscores and dashes",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": NO_SCHEMA}},
            "response_format.json_schema.schema",
            "is 1, expected an object",
        ),
    ],
)
def test_a_completion_that_cannot_be_is_refused_by_name(
    service: Service, body: dict[str, Any], param: str, message: str
) -> None:
    error = refusal(complete, service, **body)
    assert error.param == param
    assert re.search(message, str(error))
    assert str(error).isascii()


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "objct"}, "Invalid type: objct"),
        ({"type": "object", "if": {}}, "Unimplemented keys"),
        ({"type": "string", "pattern": "(a"}, "regex parse error"),
        ({"$ref": "#/nowhere"}, "does not exist"),
        ({"$ref": "http://elsewhere.example/x.json"}, "not present"),
        ({"enum": []}, "Unsatisfiable"),
        ({"enum": ["x" * 70000]}, "bytes, expected at most 65536"),
    ],
)
def test_a_schema_that_cannot_be_kept_to_is_refused(
    service: Service, schema: dict[str, Any], message: str
) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    error = refusal(complete, service, response_format=wanted)
    assert error.param == "response_format.json_schema.schema"
    assert re.search(message, str(error))
