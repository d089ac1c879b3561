"""``edge-memllm serve``: a model behind OpenAI's protocol."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING

from edge_memllm.cli.files import read_text
from edge_memllm.cli.options import add_command, add_json, add_loading, loading_keywords
from edge_memllm.cli.serve_options import add_serving, settings_from
from edge_memllm.cli.text import write_json
from edge_memllm.errors import missing_extra
from edge_memllm.interrupts import leave
from edge_memllm.prefill import SERVING_CHUNK

if TYPE_CHECKING:
    import socket

    from edge_memllm.chat import ChatTemplate
    from edge_memllm.cli.options import Commands
    from edge_memllm.model import Model
    from edge_memllm.serving.http.service import Service
    from edge_memllm.serving.http.settings import Settings

EXIT_STUCK = 1
_PATIENCE = 3.0  # seconds
_PACKAGES = ("starlette", "uvicorn")

_DESCRIPTION = """\
Serve a model over HTTP, in the words of OpenAI's API: completions, chat where the model has a
template, streaming, likelihoods, JSON by a schema. Many requests run together; each distinct token
of a step is read from storage once. docs/serving.md has the details.

It listens to this machine alone unless --host says otherwise. Ctrl-C, or SIGTERM, lets replies
under way finish; a second one ends at once."""

_EXAMPLES = """\
  edge-memllm serve artifact
  edge-memllm serve artifact --port 9000 --slots 4 --chat-template chat.jinja
  edge-memllm serve artifact --host 0.0.0.0 --api-key-file keys.txt --max-tokens 512
  edge-memllm serve artifact --cors https://example.org --json"""


def add_parser(commands: Commands) -> None:
    """Register the command."""
    parser = add_command(
        commands,
        "serve",
        execute,
        summary="serve a model over HTTP, as OpenAI's API does",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="an exported model")
    parser.add_argument(
        "--chat-template",
        type=Path,
        metavar="FILE",
        help="a Jinja template that makes a prompt of chat messages (default: the artifact's)",
    )
    add_json(parser)
    add_serving(parser)
    add_loading(parser, prefill=str(SERVING_CHUNK))


def execute(arguments: argparse.Namespace) -> int:
    """Run the command."""
    for package in _PACKAGES:
        if find_spec(package) is None:
            raise missing_extra(package, "serve")

    import edge_memllm
    from edge_memllm.serving.http.server import bound_socket

    settings = settings_from(arguments)
    with (
        _logging_to_stderr(settings),
        bound_socket(arguments.host, arguments.port) as bound,
        edge_memllm.load(arguments.artifact, **loading_keywords(arguments)) as model,
    ):
        path = arguments.chat_template
        template = None if path is None else _template(path, model)
        return _serve(model, template, settings, bound, arguments)


def _template(path: Path, model: Model) -> ChatTemplate:
    from edge_memllm.chat import ChatTemplate
    from edge_memllm.request import start_token

    spec, spell = model.manifest.model, model.tokenizer.spelling
    start, ends = start_token(spec), spec.eos_token_ids
    named = {
        "bos_token": None if start is None else spell(start),
        "eos_token": spell(ends[0]) if ends else None,
        **model.tokenizer.named_tokens,
    }
    template = ChatTemplate(
        read_text(path), {name: text for name, text in named.items() if text}, str(path)
    )
    template.check()
    return template


def _serve(
    model: Model,
    template: ChatTemplate | None,
    settings: Settings,
    bound: socket.socket,
    arguments: argparse.Namespace,
) -> int:
    from edge_memllm.serving.engine import Engine
    from edge_memllm.serving.http.server import Server
    from edge_memllm.serving.http.service import Service

    with Engine(
        model,
        slots=arguments.slots,
        queue=arguments.queue,
        per_client=arguments.per_client,
        prefill_chunk=arguments.prefill_chunk,
        batch_invariant=arguments.batch_invariant,
    ) as engine:
        service = Service(engine, settings, template)
        server = Server(service)
        _announce(service, bound, as_json=arguments.json)
        server.run(sockets=[bound])
        if not (engine.close(_PATIENCE) and _at_rest(service)):
            # Nothing that they use may be closed, and no thread can be stopped.
            print("error: work on a request does not come back. Left it there.", file=sys.stderr)
            leave(EXIT_STUCK)
    return 0


def _at_rest(service: Service) -> bool:
    """Wait a moment for threads whose work nobody waits for any more; False if one goes on."""
    until = monotonic() + _PATIENCE
    while service.busy and monotonic() < until:
        sleep(0.01)
    return not service.busy


def _announce(service: Service, bound: socket.socket, *, as_json: bool) -> None:
    """Say where the server is, before it listens: it does from the next moment on."""
    from edge_memllm.serving.http.guard import missing_protection

    settings, engine = service.settings, service.engine.statistics
    url = _url(bound)
    for warning in missing_protection(settings):
        print(f"warning: {warning}", file=sys.stderr)
    if as_json:
        chat = service.template is not None
        write_json({"url": url, "model": settings.model_id, "slots": engine.slots, "chat": chat})
        sys.stdout.flush()
        return
    kinds = "completions and chat" if service.template else "completions (no chat template)"
    key = "with a key" if settings.api_keys else "without a key"
    print(f"{settings.model_id} at {url}: {kinds}, {engine.slots} at once, {key}", file=sys.stderr)
    print(f"a page for people: {url}/   for programs: {url}/v1   Ctrl-C ends", file=sys.stderr)


def _url(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextmanager
def _logging_to_stderr(settings: Settings) -> Iterator[None]:
    """Show our warnings, and requests where that is wished; what is below us makes noise."""
    requests = logging.INFO if settings.log_requests else logging.WARNING
    levels = {
        "edge_memllm": logging.WARNING,
        "edge_memllm.serving.http.server": logging.INFO,
        "edge_memllm.serving.http.journal": requests,
        "uvicorn": logging.CRITICAL,
        "asyncio": logging.ERROR,
    }
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    before = {name: logging.getLogger(name).level for name in levels}
    logging.getLogger("edge_memllm").addHandler(handler)
    try:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        yield
    finally:
        logging.getLogger("edge_memllm").removeHandler(handler)
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
