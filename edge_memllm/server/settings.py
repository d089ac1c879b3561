"""How a server behaves: who may ask, and how much. Plain values, checked by the command line."""

from __future__ import annotations

from dataclasses import dataclass, field

KIB = 1 << 10


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request, or one connection, may take. None leaves it to the model's context."""

    prompt_tokens: int | None = None
    max_tokens: int | None = None
    choices: int = 16  # of one request: n times its prompts
    body_bytes: int = 2048 * KIB
    brief_bytes: int = 64 * KIB  # bodies beyond this are read one at a time
    long_bodies: int = 8  # of those, how many may be in memory
    schema_bytes: int = 64 * KIB
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
    reply_seconds: float | None = None  # from being asked to the end of a reply


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything about a server but the model and its engine."""

    model_id: str
    host: str = "127.0.0.1"
    api_keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()  # of pages elsewhere that may ask; "*" is any
    hosts: tuple[str, ...] = ()  # further names this server is called by
    drain_seconds: float = 10.0
    pulse_seconds: float = 10.0  # a waiting stream says so at this interval
    log_requests: bool = False
    limits: Limits = field(default_factory=Limits)
