"""A server in a thread, and ways to talk to it: what tests of serving over HTTP share."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from edge_memllm import Model
from edge_memllm.engine import Engine
from edge_memllm.server.calls import Call, read_chat, read_completion
from edge_memllm.server.fields import ApiError, BodyFields
from edge_memllm.server.models import ServedModels
from edge_memllm.server.protocols.llama_request import read_llama
from edge_memllm.server.protocols.messages_request import read_message
from edge_memllm.server.protocols.responses_request import read_response
from edge_memllm.server.server import Server, bound_socket
from edge_memllm.server.service import Service
from edge_memllm.server.settings import Limits, Settings
from edge_memllm.text.chat import ChatTemplate
from edge_memllm_runtimes.fake import FakeRuntime
from support.engine import wait_until
from support.small_model import open_small_model, write_small_artifact

MODEL_ID = "small"
HELLO = [{"role": "user", "content": "Hi"}]
LIMITS = Limits(prompt_tokens=100, max_tokens=50, choices=4, stops=3, biases=2)
TEMPLATE = ChatTemplate(
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}",
    {},
)


@dataclass
class Served:
    """A server that runs."""

    url: str
    service: Service
    server: Server
    thread: threading.Thread

    @property
    def engine(self) -> Engine:
        return self.service.engine

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def openai(self, **options: Any) -> OpenAI:
        defaults = {"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0}
        return OpenAI(**{**defaults, "timeout": 20, **options})

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json", **options.pop("headers", {})}
        return httpx.post(self.url + path, content=content, headers=headers, timeout=20, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=20, **options)

    def complete(self, **body: Any) -> Mapping[str, Any]:
        """A completion that must succeed."""
        response = self.post("/v1/completions", {"prompt": "Hello", **body})
        assert response.status_code == 200, response.text
        return response.json()

    def refusal(self, path: str = "/v1/completions", **body: Any) -> Mapping[str, Any]:
        """The error of a request that must be refused with 400."""
        response = self.post(path, body)
        assert response.status_code == 400, response.text
        return response.json()["error"]

    def events(self, path: str = "/v1/completions", **body: Any) -> list[Any]:
        """The events of a stream: JSON, and the words that are none."""
        response = self.post(path, {"stream": True, **body})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        return list(events_of(response.text))

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), 10)

    def ask_raw(self, body: Mapping[str, Any]) -> socket.socket:
        """Ask for a completion on a socket of one's own, which the caller closes."""
        content = json.dumps(body).encode()
        found = self.connect()
        found.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\n"
            + f"Content-Length: {len(content)}\r\n\r\n".encode()
            + content
        )
        return found

    def settled(self) -> None:
        """Wait until nothing is under way any more."""
        wait_until(lambda: not busy(self.engine))


def busy(engine: Engine) -> int:
    statistics = engine.statistics
    return statistics.under_way + statistics.queued


def events_of(text: str) -> Iterator[Any]:
    for block in text.split("\n\n"):
        name, _, rest = block.partition("\n")
        if name.startswith("event: "):
            block = rest
            assert json.loads(rest.removeprefix("data: "))["type"] == name.removeprefix("event: ")
        kind, _, data = block.partition(": ")
        if kind == "data":
            yield data if data == "[DONE]" else json.loads(data)
        elif block:
            yield block


@contextmanager
def serving(
    model: Model,
    *,
    template: ChatTemplate | None = None,
    engine: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Iterator[Served]:
    """Serve a model until the context ends; `settings` are those of `Settings`."""
    with (
        Engine(model, **{"slots": 4, "queue": 32, **(engine or {})}) as made,
        bound_socket("127.0.0.1", 0) as bound,
    ):
        service = Service(made, Settings(MODEL_ID, **settings), template)
        server = Server(ServedModels.of(service))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        wait_until(lambda: server.started)
        try:
            yield Served(url, service, server, thread)
        finally:
            server.should_exit = True
            thread.join(120)  # others may need the machine
            assert not thread.is_alive()


@contextmanager
def serving_small(
    folder: Path, runtime: FakeRuntime | None = None, **options: Any
) -> Iterator[Served]:
    """Serve an artifact of `small_model` over the fake runtime."""
    with open_small_model(folder, runtime) as model, serving(model, **options) as served:
        yield served


@contextmanager
def reading(folder: Path) -> Iterator[Service]:
    """What requests are read with: no server, limits that are quickly reached."""
    config = b'{"do_sample": true, "temperature": 0.5, "top_k": 7}'
    made = write_small_artifact(folder / "artifact", generation_config__json=config)
    with open_small_model(made.path) as model, Engine(model) as engine:
        yield Service(engine, Settings(MODEL_ID, limits=LIMITS), TEMPLATE)


def complete(service: Service, **body: Any) -> Call:
    return compiled(read_completion(BodyFields({"prompt": "Hello", **body}), service), service)


def chat(service: Service, **body: Any) -> Call:
    return compiled(read_chat(BodyFields({"messages": HELLO, **body}), service), service)


def respond(service: Service, **body: Any) -> Call:
    return compiled(read_response(BodyFields({"input": "Hi", **body}), service), service)


def llama(service: Service, **body: Any) -> Call:
    return compiled(read_llama(BodyFields({"prompt": "Hello", **body}), service), service)


def message(service: Service, **body: Any) -> Call:
    asked = {"messages": HELLO, "max_tokens": 9, **body}
    return compiled(read_message(BodyFields(asked), service), service)


def compiled(call: Call, service: Service) -> Call:
    """A call whose schema, if it has one, can be kept to."""
    asyncio.run(service.constraint(call.form))
    return call


def refusal(read: Any, service: Service, **body: Any) -> ApiError:
    with pytest.raises(ApiError) as refused:
        read(service, **body)
    assert refused.value.status == 400
    return refused.value
