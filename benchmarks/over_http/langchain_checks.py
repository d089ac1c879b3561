"""langchain's standard tests of a chat model, over this server.

    python -m benchmarks.over_http.langchain_checks URL [--over chat|responses] [words of pytest]

Wants `langchain-tests` and `langchain-openai`. The first model of the server is asked; tests that
take another one for a single request want a server of two models. Tests of speed, and of images,
audio and PDF, do not apply.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import urllib.request
from collections.abc import Sequence
from typing import Any

import pytest
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests

_SETUP = "LANGCHAIN_CHECKS"  # pytest imports this file again, and reads there what to ask
_OPTIONS = ("-v", "-rfEs", "--tb=short", "-p", "no:cacheprovider", "-c", os.devnull)
# Without the mode, tests that are coroutines fail unrun. langchain keeps one client for all of
# them, whose connections are of the loop they were made in.
_ASYNCIO = ("-o", "asyncio_mode=auto", "-o", "asyncio_default_test_loop_scope=session")


class TestChatModel(ChatModelIntegrationTests):
    """The tests, with what this server has."""

    @property
    def chat_model_class(self) -> type[ChatOpenAI]:
        """Return the client."""
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        """Return what it is made with."""
        return {
            "model": _setup()["model"],
            "base_url": _setup()["url"],
            "use_responses_api": _setup()["over"] == "responses",
            "stream_usage": True,  # asked for by itself of OpenAI alone
            "api_key": "none",
            "max_tokens": 300,
            "max_retries": 0,
            "temperature": 0,
        }

    @property
    def model_override_value(self) -> str | None:
        """Return the name of another model, if there is one."""
        other: str | None = _setup()["other"]
        return other

    @property
    def structured_output_kwargs(self) -> dict[str, Any]:
        """Return how objects of a schema are asked for."""
        return {"method": "json_schema"}

    @property
    def supports_json_mode(self) -> bool:
        """Return that there is JSON without a schema, too."""
        return True


def main(words: Sequence[str] | None = None) -> int:
    """Run the tests, and return what pytest returns."""
    parser = argparse.ArgumentParser("python -m benchmarks.over_http.langchain_checks")
    parser.add_argument("url", help="as http://127.0.0.1:8080")
    parser.add_argument("--over", choices=("chat", "responses"), default="chat")
    asked, further = parser.parse_known_args(words)
    url = asked.url.rstrip("/") + "/v1"
    with urllib.request.urlopen(f"{url}/models") as answer:
        names = [each["id"] for each in json.load(answer)["data"]]
    other = names[1] if len(names) > 1 else None
    setup = {"url": url, "over": asked.over, "model": names[0], "other": other}
    os.environ[_SETUP] = json.dumps(setup)
    return pytest.main([__file__, *_OPTIONS, *_ASYNCIO, "-m", "not benchmark", *further])


def _setup() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(os.environ[_SETUP])
    return found


if __name__ == "__main__":
    sys.exit(main())
