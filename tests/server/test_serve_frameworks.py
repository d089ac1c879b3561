"""Frameworks around models against the server: what of them needs no wit of the model.

pydantic-ai and instructor are skipped where they are not installed. langchain's standard tests
want a model that can talk: `benchmarks.over_http.langchain_checks`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from edge_memllm_runtimes.fake import FakeRuntime
from support.checkpoints import VOCABULARY
from support.server import MODEL_ID, TEMPLATE, Served, serving_small
from support.small_model import write_small_artifact

ROOM = 8192


class Light(BaseModel):
    """What has a form that any model can keep to."""

    room: Literal["hall", "attic"]
    on: bool


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder: Path = write_small_artifact(tmp_path_factory.mktemp("artifact") / "a", ROOM).path
    with serving_small(folder, FakeRuntime(VOCABULARY, ROOM), template=TEMPLATE) as found:
        yield found


@pytest.mark.parametrize("protocol", ["OpenAIChatModel", "OpenAIResponsesModel"])
@pytest.mark.parametrize("output", ["ToolOutput", "NativeOutput"])
def test_pydantic_ai_gets_its_output(served: Served, protocol: str, output: str) -> None:
    ai = pytest.importorskip("pydantic_ai")
    models = pytest.importorskip("pydantic_ai.models.openai")
    providers = pytest.importorskip("pydantic_ai.providers.openai")

    async def asked() -> Any:
        async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
            provider = providers.OpenAIProvider(openai_client=client)
            model = getattr(models, protocol)(MODEL_ID, provider=provider)
            agent: Any = ai.Agent(model, output_type=getattr(ai, output)(Light), retries=0)
            return await agent.run("Hi", model_settings={"max_tokens": 200})

    assert isinstance(asyncio.run(asked()).output, Light)


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_instructor_gets_its_model(served: Served, mode: str) -> None:
    instructor = pytest.importorskip("instructor")
    with OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as openai:
        client = instructor.from_openai(openai, mode=getattr(instructor.Mode, mode))
        found = client.chat.completions.create(
            model=MODEL_ID,
            response_model=Light,
            messages=[{"role": "user", "content": "Hi"}],
            max_tokens=200,
            max_retries=0,
        )
    assert isinstance(found, Light)


def test_openai_parses(served: Served) -> None:
    with served.openai() as client:
        chat = client.chat.completions.parse(
            model=MODEL_ID,
            messages=[{"role": "user", "content": "Hi"}],
            response_format=Light,
            max_tokens=200,
        )
        response = client.responses.parse(
            model=MODEL_ID, input="Hi", text_format=Light, max_output_tokens=200
        )
    assert isinstance(chat.choices[0].message.parsed, Light)
    assert isinstance(response.output_parsed, Light)
