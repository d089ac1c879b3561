"""``edge-memllm serve``: a model behind OpenAI's protocol."""

from __future__ import annotations

import logging
import os
import sys
from argparse import ArgumentTypeError
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING, Annotated

from edge_memllm.cli.models import Yes, load_model
from edge_memllm.cli.options import Command, Json
from edge_memllm.cli.output import read_text, write_json
from edge_memllm.engine.feeding import SERVING_CHUNK
from edge_memllm.engine.request import start_token
from edge_memllm.errors import RequestError, missing_extra
from edge_memllm.loading import LoadOptions
from edge_memllm.model import Model
from edge_memllm.options import Group, Option, positive_int
from edge_memllm.process.interrupts import leave
from edge_memllm.server.settings import KEY_VARIABLE, Settings
from edge_memllm.store.source import hub_source
from edge_memllm.text.chat import ChatTemplate

if TYPE_CHECKING:
    import socket

    from edge_memllm.server.service import Service


LEAST_KEY = 8

EXIT_STUCK = 1
_PATIENCE = 3.0  # seconds
_PACKAGES = ("starlette", "uvicorn")

_DESCRIPTION = """\
Serve a model over HTTP, in the words of OpenAI's API and Anthropic's: completions, chat where the
model has a template, tools, streaming, likelihoods, JSON by a schema. Many requests run together;
each distinct token of a step is read from storage once. docs/serving.md has the details.

It listens to this machine alone unless --host says otherwise. Ctrl-C, or SIGTERM, lets replies
under way finish; a second one ends at once."""

_EXAMPLES = """\
  edge-memllm serve artifact
  edge-memllm serve artifact --port 9000 --slots 4 --chat-template chat.jinja
  edge-memllm serve artifact --host 0.0.0.0 --api-key-file keys.txt --max-tokens 512
  edge-memllm serve artifact --cors https://example.org --json"""


def port_number(text: str) -> int:
    """Parse a TCP port, or 0 for a free one."""
    value = int(text)
    if not 0 <= value < 1 << 16:
        raise ArgumentTypeError(f"{text} is not a port, expected 0 to 65535")
    return value


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What may be asked of ``edge-memllm serve``."""

    chat_template: Annotated[
        Path | None,
        Option("a Jinja template that makes a prompt of chat messages", unset="the artifact's"),
    ] = None
    json: Json = False
    yes: Yes = False
    settings: Annotated[Settings, Group(without={"model_id": ""})]
    port: Annotated[
        int,
        Option(
            "0 takes a free one and says which", parse=port_number, metavar="N", group="address"
        ),
    ] = 8080
    name: Annotated[
        str | None,
        Option("the model's name in requests", "NAME", unset="its folder's", group="address"),
    ] = None
    api_key_file: Annotated[
        Path | None, Option("ask for one of these keys, one a line", group="access")
    ] = None
    slots: Annotated[
        int,
        Option(
            "texts under way at once; each has keys and values of its own",
            parse=positive_int,
            group="work",
        ),
    ] = 4
    queue: Annotated[
        int,
        Option(
            "texts that may wait for a slot, beyond that the answer is 429",
            parse=positive_int,
            group="work",
        ),
    ] = 64
    per_client: Annotated[
        int | None,
        Option(
            "texts of one client that may wait",
            parse=positive_int,
            unset="as many as may wait at all",
            group="work",
        ),
    ] = None
    batch_invariant: Annotated[
        bool,
        Option(
            "the same request gets the same reply to the last bit, whatever else goes on; slower",
            group="work",
        ),
    ] = False
    loading: Annotated[LoadOptions, Group("loading", unset={"prefill_chunk": str(SERVING_CHUNK)})]


def settings_of(options: ServeOptions) -> Settings:
    """Return how the server is to behave. Raises `RequestError` for what cannot be."""
    from edge_memllm.server.guard import checked_host, checked_origin

    asked = options.settings
    for option, room in (("--queue", options.queue), ("--per-client", options.per_client)):
        if room is not None and asked.limits.choices > room:
            raise RequestError(
                f"--max-choices is {asked.limits.choices} and {option} {room}: a request of that "
                f"many replies would never find room. Give more {option}, or fewer choices."
            )
    return replace(
        asked,
        model_id=_model_id(options),
        api_keys=_keys(options),
        origins=tuple(map(checked_origin, asked.origins)),
        hosts=tuple(map(checked_host, asked.hosts)),
    )


def _model_id(options: ServeOptions) -> str:
    path = Path(options.loading.path)
    hub = hub_source(path)
    local = path.stem if path.suffix.lower() == ".gguf" else path.resolve().name
    found = options.name or (local if hub is None else hub.model.repository)
    for name, option in (
        (found, "--name"),
        *((each, "--alias") for each in options.settings.aliases),
    ):
        if not name.isprintable() or not name.strip():
            raise RequestError(
                f"the model's name is {name!r}, which nobody can type. Give {option}."
            )
    return found


def _keys(options: ServeOptions) -> tuple[str, ...]:
    """Return the keys from the options, the file and the environment."""
    keys = [*options.settings.api_keys]
    if KEY_VARIABLE in os.environ:
        keys.append(os.environ[KEY_VARIABLE])
    if options.api_key_file is not None:
        lines = (line.strip() for line in read_text(options.api_key_file).splitlines())
        found = [line for line in lines if line]
        if not found:
            raise RequestError(f"{options.api_key_file}: no key in it. Write one a line.")
        keys += found
    for key in keys:
        if len(key) < LEAST_KEY or not key.isprintable() or " " in key:
            raise RequestError(
                f"an API key has {len(key)} characters, expected {LEAST_KEY} or more, without "
                "spaces. Take a long random one."
            )
    return tuple(dict.fromkeys(keys))


def execute(options: ServeOptions) -> int:
    """Run the command."""
    for package in _PACKAGES:
        if find_spec(package) is None:
            raise missing_extra(package, "serve")
    from edge_memllm.server.server import bound_socket

    settings = settings_of(options)
    with (
        _logging_to_stderr(settings),
        bound_socket(settings.host, options.port) as bound,
        load_model(options.loading, yes=options.yes) as model,
    ):
        path = options.chat_template
        template = None if path is None else _template(path, model)
        return _serve(model, template, settings, bound, options)


def _template(path: Path, model: Model) -> ChatTemplate:
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
    options: ServeOptions,
) -> int:
    from edge_memllm.engine.engine import Engine
    from edge_memllm.server.server import Server
    from edge_memllm.server.service import Service

    with Engine(
        model,
        slots=options.slots,
        queue=options.queue,
        per_client=options.per_client,
        prefill_chunk=options.loading.prefill_chunk,
        batch_invariant=options.batch_invariant,
    ) as engine:
        service = Service(engine, settings, template)
        server = Server(service)
        _announce(service, bound, as_json=options.json)
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
    from edge_memllm.server.guard import missing_protection

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
        "edge_memllm.server.server": logging.INFO,
        "edge_memllm.server.guard": requests,
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


SERVE = Command(ServeOptions, execute, _DESCRIPTION, _EXAMPLES)
