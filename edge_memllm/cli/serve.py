"""``edge-memllm serve``: a model behind OpenAI's protocol."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING

from edge_memllm.cli.options import (
    add_command,
    add_json,
    add_loading,
    byte_size,
    loading_keywords,
    positive_int,
    positive_number,
)
from edge_memllm.cli.output import read_text, write_json
from edge_memllm.errors import RequestError, missing_extra
from edge_memllm.feeding import SERVING_CHUNK
from edge_memllm.hub.names import HubModel
from edge_memllm.process.interrupts import leave

if TYPE_CHECKING:
    import socket

    from edge_memllm.cli.options import Commands
    from edge_memllm.model import Model
    from edge_memllm.server.service import Service
    from edge_memllm.server.settings import Settings
    from edge_memllm.text.chat import ChatTemplate


KEY_VARIABLE = "EDGE_MEMLLM_API_KEY"
LEAST_KEY = 8

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


def add_serving(parser: argparse.ArgumentParser) -> None:
    """Add everything but the loading of the model; `settings_from` turns it into settings."""
    _add_address(parser)
    _add_access(parser)
    _add_work(parser)
    _add_limits(parser)


def _add_address(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("address")
    group.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="where to listen; 0.0.0.0 is everywhere (default: 127.0.0.1, this machine alone)",
    )
    group.add_argument(
        "--port",
        type=port_number,
        default=8080,
        metavar="N",
        help="0 takes a free one and says which (default: 8080)",
    )
    group.add_argument(
        "--name", metavar="NAME", help="the model's name in requests (default: its folder's)"
    )


def _add_access(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("access")
    group.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help=f"ask for this key; may be repeated. Others see it in the list of processes: "
        f"${KEY_VARIABLE} or a file is better",
    )
    group.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="ask for one of these keys, one a line"
    )
    group.add_argument(
        "--cors",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let pages from https://example.org ask; may be repeated, '*' is any (default: none)",
    )
    group.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a further name that requests may call this server by, as behind a proxy",
    )


def _add_work(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("work")
    group.add_argument(
        "--slots",
        type=positive_int,
        default=4,
        metavar="N",
        help="texts under way at once; each has keys and values of its own (default: 4)",
    )
    group.add_argument(
        "--queue",
        type=positive_int,
        default=64,
        metavar="N",
        help="texts that may wait for a slot, beyond that the answer is 429 (default: 64)",
    )
    group.add_argument(
        "--per-client",
        type=positive_int,
        metavar="N",
        help="texts of one client that may wait (default: as many as may wait at all)",
    )
    group.add_argument(
        "--batch-invariant",
        action="store_true",
        help="the same request gets the same reply to the last bit, whatever else goes on; slower",
    )
    group.add_argument(
        "--drain-seconds",
        type=positive_number,
        default=10.0,
        metavar="X",
        help="how long replies under way may take when the server ends (default: 10)",
    )
    group.add_argument(
        "--log-requests", action="store_true", help="a line on stderr for each request"
    )


def _add_limits(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("limits of a request")
    group.add_argument(
        "--max-tokens",
        type=positive_int,
        metavar="N",
        help="the most it may ask for (default: what the context holds)",
    )
    group.add_argument(
        "--max-prompt",
        type=positive_int,
        metavar="N",
        help="tokens of a prompt (default: what the context holds)",
    )
    group.add_argument(
        "--max-choices",
        type=positive_int,
        default=16,
        metavar="N",
        help="replies: n for each of its prompts (default: 16)",
    )
    group.add_argument(
        "--max-body",
        type=byte_size,
        default=2 << 20,
        metavar="SIZE",
        help="its size (default: 2MiB)",
    )
    group.add_argument(
        "--timeout",
        type=positive_number,
        metavar="X",
        help="seconds from asking to the end of the reply, waiting included (default: any)",
    )


def settings_from(arguments: argparse.Namespace) -> Settings:
    """Return the settings that the options stand for. Raises `RequestError`."""
    from edge_memllm.server.guard import checked_host, checked_origin
    from edge_memllm.server.settings import Limits, Settings

    for option, room in (("--queue", arguments.queue), ("--per-client", arguments.per_client)):
        if room is not None and arguments.max_choices > room:
            raise RequestError(
                f"--max-choices is {arguments.max_choices} and {option} {room}: a request of that "
                f"many replies would never find room. Give more {option}, or fewer choices."
            )
    limits = Limits(
        prompt_tokens=arguments.max_prompt,
        max_tokens=arguments.max_tokens,
        choices=arguments.max_choices,
        body_bytes=arguments.max_body,
        reply_seconds=arguments.timeout,
    )
    return Settings(
        model_id=_model_id(arguments),
        host=arguments.host,
        api_keys=_keys(arguments),
        origins=tuple(map(checked_origin, arguments.cors)),
        hosts=tuple(map(checked_host, arguments.allow_host)),
        drain_seconds=arguments.drain_seconds,
        log_requests=arguments.log_requests,
        limits=limits,
    )


def port_number(text: str) -> int:
    """An argparse type: a TCP port, or 0 for a free one."""
    value = int(text)
    if not 0 <= value < 1 << 16:
        raise argparse.ArgumentTypeError(f"{text} is not a port, expected 0 to 65535")
    return value


def _model_id(arguments: argparse.Namespace) -> str:
    hub = HubModel.parse(arguments.artifact)
    found = arguments.artifact.resolve().name if hub is None else hub.repository
    name: str = arguments.name or found
    if not name.isprintable() or not name.strip():
        raise RequestError(f"the model's name is {name!r}, which nobody can type. Give --name.")
    return name


def _keys(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Return the keys from the options, the file and the environment."""
    keys = [*arguments.api_key]
    if KEY_VARIABLE in os.environ:
        keys.append(os.environ[KEY_VARIABLE])
    if arguments.api_key_file is not None:
        lines = (line.strip() for line in read_text(arguments.api_key_file).splitlines())
        found = [line for line in lines if line]
        if not found:
            raise RequestError(f"{arguments.api_key_file}: no key in it. Write one a line.")
        keys += found
    for key in keys:
        if len(key) < LEAST_KEY or not key.isprintable() or " " in key:
            raise RequestError(
                f"an API key has {len(key)} characters, expected {LEAST_KEY} or more, without "
                "spaces. Take a long random one."
            )
    return tuple(dict.fromkeys(keys))


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
    from edge_memllm.server.server import bound_socket

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
    from edge_memllm.request import start_token
    from edge_memllm.text.chat import ChatTemplate

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
    from edge_memllm.engine.engine import Engine
    from edge_memllm.server.server import Server
    from edge_memllm.server.service import Service

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
