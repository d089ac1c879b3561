"""Options of ``edge-memllm serve``, and the settings that they stand for."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from edge_memllm.cli.files import read_text
from edge_memllm.cli.options import byte_size, positive_int, positive_number
from edge_memllm.errors import RequestError
from edge_memllm.hub.names import HubModel

if TYPE_CHECKING:
    from edge_memllm.serving.http.settings import Settings

KEY_VARIABLE = "EDGE_MEMLLM_API_KEY"
LEAST_KEY = 8


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
    from edge_memllm.serving.http.guard import checked_host, checked_origin
    from edge_memllm.serving.http.settings import Limits, Settings

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
