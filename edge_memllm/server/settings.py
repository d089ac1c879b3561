"""How a server behaves: who may ask, and how much. Plain values, checked by the command line."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from typing import Annotated, Literal

from edge_memllm.options import Group, Option, byte_size, positive_int, positive_number

KIB = 1 << 10
LOOPBACK = "127.0.0.1"
UNIX = "unix:"  # begins an address that is a path
KEY_VARIABLE = "EDGE_MEMLLM_API_KEY"  # of the environment


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one request, or one connection, may take. None leaves it to the model's context."""

    max_tokens: Annotated[
        int | None,
        Option("the most it may ask for", parse=positive_int, unset="what the context holds"),
    ] = None
    prompt_tokens: Annotated[
        int | None,
        Option(
            "tokens of a prompt",
            parse=positive_int,
            flag="--max-prompt",
            unset="what the context holds",
        ),
    ] = None
    choices: Annotated[
        int, Option("replies: n for each of its prompts", parse=positive_int, flag="--max-choices")
    ] = 16
    body_bytes: Annotated[int, Option("its size", parse=byte_size, flag="--max-body")] = 2048 * KIB
    reply_seconds: Annotated[
        float | None,
        Option(
            "seconds from asking to the end of the reply, waiting included",
            parse=positive_number,
            flag="--timeout",
            unset="any",
        ),
    ] = None
    brief_bytes: int = 64 * KIB  # bodies beyond this are read one at a time
    long_bodies: int = 8  # of those, how many may be in memory
    schema_bytes: int = 64 * KIB
    tools: int = 128
    tool_bytes: int = 256 * KIB  # of all of them, as JSON
    schemas_waiting: int = 4  # to be compiled, one at a time
    text_characters: int = 256 * KIB  # of a text to be tokenized for its own sake
    text_tokens: int = 128 * KIB  # to be made text for its own sake
    stops: int = 16
    biases: int = 1024
    overlays: int = 16
    connections: int = 512
    header_seconds: float = 10.0  # from connecting, or from its first byte, to the whole header
    idle_seconds: float = 75.0  # between two requests of one connection
    body_seconds: float = 30.0
    send_seconds: float = 60.0  # that a client may leave its reply unread


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything about a server but the model and its engine."""

    model_id: str
    _: KW_ONLY
    addresses: Annotated[
        tuple[str, ...],
        Option(
            f"where to listen; may be repeated. 0.0.0.0 is everywhere, {UNIX}PATH a socket of this "
            "machine",
            metavar="ADDRESS",
            parse=str,
            several="repeated",
            flag="--host",
            unset=f"this machine alone, {LOOPBACK}",
            group="address",
        ),
    ] = ()
    api_keys: Annotated[
        tuple[str, ...],
        Option(
            "ask for this key; may be repeated. Others see it in the list of processes: "
            f"${KEY_VARIABLE} or a file is better",
            metavar="KEY",
            parse=str,
            several="repeated",
            flag="--api-key",
            group="access",
        ),
    ] = ()
    aliases: Annotated[
        tuple[str, ...],
        Option(
            "another name that requests may call the model by; may be repeated",
            metavar="NAME",
            parse=str,
            several="repeated",
            flag="--alias",
            group="address",
        ),
    ] = ()
    origins: Annotated[
        tuple[str, ...],
        Option(
            "let pages from https://example.org ask; may be repeated, '*' is any",
            metavar="ORIGIN",
            parse=str,
            several="repeated",
            flag="--cors",
            unset="none",
            group="access",
        ),
    ] = ()
    hosts: Annotated[
        tuple[str, ...],
        Option(
            "a further name that requests may call this server by, as behind a proxy",
            metavar="NAME",
            parse=str,
            several="repeated",
            flag="--allow-host",
            group="access",
        ),
    ] = ()
    drain_seconds: Annotated[
        float,
        Option(
            "how long replies under way may take when the server ends",
            parse=positive_number,
            group="work",
        ),
    ] = 10.0
    idle_seconds: Annotated[
        float | None,
        Option(
            "free a model that nobody has asked for so long; the next request loads it again",
            metavar="SECONDS",
            parse=positive_number,
            flag="--idle-unload",
            unset="it stays",
            group="work",
        ),
    ] = None
    seed: Annotated[
        int | None,
        Option(
            "of requests that give none: the same request gets the same reply then",
            unset="drawn for each",
            group="requests that do not say",
        ),
    ] = None
    reasoning: Annotated[
        Literal["auto", "on", "off"],
        Option(
            "whether a model that can reason does: enable_thinking of its template. 'off' closes "
            "what a template opens",
            unset="auto, as the template has it",
            group="requests that do not say",
        ),
    ] = "auto"
    speculate: Annotated[
        int,
        Option(
            "draft tokens of one step, as in 'run'; a step that several texts share has none",
            group="requests that do not say",
        ),
    ] = 0
    page: Annotated[bool, Option("serve no page for people", flag="--no-page", group="access")] = (
        True
    )
    log_requests: Annotated[bool, Option("a line on stderr for each request", group="work")] = False
    pulse_seconds: float = 10.0  # a waiting stream says so at this interval
    limits: Annotated[Limits, Group("limits of a request")] = field(default_factory=Limits)

    @property
    def listens(self) -> tuple[str, ...]:
        """Where it does: on this machine alone, if nothing is said."""
        return self.addresses or (LOOPBACK,)
