"""A session in one safetensors file: keys and values, the text, and what has to be known.

The file may be hostile: all of it is checked before anything is used. Knows bytes and arrays;
nothing of generating.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from io import BufferedReader
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from edge_memllm.artifact.atomic import WholeFile
from edge_memllm.artifact.manifest import Manifest
from edge_memllm.artifact.model_spec import ModelSpec
from edge_memllm.artifact.open_files import not_read, open_regular
from edge_memllm.artifact.strict_json import exact_fields, parse_json_object
from edge_memllm.artifact.tensor_header import (
    DIGEST,
    LENGTH,
    UNSEALED,
    FileKind,
    Tensors,
    compact,
    data_bytes,
    header_bytes,
    tensor_views,
)
from edge_memllm.checked_values import Fields
from edge_memllm.engine.chat import Message
from edge_memllm.engine.request import check_tokens
from edge_memllm.errors import ArtifactError, CorruptionError, RequestError
from edge_memllm.overlays.loaded import Selection
from edge_memllm.runtime_protocol import KVStateLayout
from edge_memllm.sampling import SEED_LIMIT, Sampling, random_draws

_VERSION_1 = "1"  # without messages
_KIND = FileKind(
    format="edge-memllm-session",
    version="2",
    earlier=(_VERSION_1,),
    name="session",
    meaning="a saved session",
    advice="'Session.save' makes one.",
    anew="begin a new session",
)
_MOST_TOKENS = 1 << 24
_MOST_MESSAGES = 1 << 26  # bytes
_ORIGIN = ("identity", "artifact", "codec", "overlays", "digests")
_FIELDS = (*_ORIGIN, "tokens", "computed", "logits", "sampling", "seed", "draws")
_HALF = re.compile(r"[0-9a-f]{32}")
_OBJECT = re.compile(r"(?s)\{.*")
_NAME = re.compile(r"(?s).{1,80}")
_COPY_AGAIN = "The file is incomplete or damaged; save the session again."
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class SessionState:
    """A session between two calls. `logits` are there exactly when all tokens are computed."""

    sampling: Sampling
    seed: int
    draws: np.random.Generator  # of PCG64
    tokens: tuple[int, ...] = ()
    computed: int = 0  # of the tokens, from the front
    logits: NDArray[np.float32] | None = None  # [V]
    kv: Mapping[str, NDArray[Any]] = field(default_factory=dict)  # what `KVCache.state` gives
    messages: tuple[Message, ...] = ()  # of its chat


@dataclass(frozen=True, slots=True)
class Origin:
    """What keys and values depend on, beside the text."""

    identity: str  # of the model
    artifact: str  # fingerprint of the manifest, which names every file by its digest
    codec: str  # of the rows as they are read: another one for coarse quality
    overlays: tuple[str, ...]  # names, in their order
    digests: tuple[str, ...]  # what these overlays do

    @classmethod
    def of(cls, manifest: Manifest, records: Selection) -> Origin:
        """Return the origin of what a model computes from these records; reads the overlays."""
        return cls(
            identity=manifest.model.identity,
            artifact=manifest.fingerprint,
            codec=records.source.layout.codec_id,
            overlays=records.names,
            digests=tuple(overlay.digest() for overlay in records.overlays),
        )

    def check(self, model: Origin, where: str) -> None:
        """Raise `RequestError` unless this is of `model`, whatever the overlays."""
        if self.identity != model.identity:
            raise RequestError(
                f"{where}: a session of model {self.identity[:19]}, this is {model.identity[:19]}. "
                "Load the model it was saved with."
            )
        if self.artifact != model.artifact:
            raise RequestError(
                f"{where}: a session of another export of this model: its graph, its table or "
                "its settings differ. Load the artifact it was saved with."
            )
        if self.codec != model.codec:
            raise RequestError(
                f"{where}: its rows were read as {self.codec}, here they are read as "
                f"{model.codec}. Load the model with the table quality it was saved with."
            )

    def check_overlays(self, model: Origin, where: str) -> None:
        """Raise `RequestError` unless the overlays of `model`, called the same, do the same."""
        for name, found, expected in zip(self.overlays, self.digests, model.digests, strict=True):
            if found != expected:
                raise RequestError(
                    f"{where}: the overlay '{name}' that is loaded is not the one it was saved "
                    "with. Load that one."
                )


@dataclass(frozen=True, slots=True)
class SessionHeader:
    """What a header says; the tensors follow from it and from the model."""

    origin: Origin
    tokens: int
    computed: int
    logits: int  # V, or 0 when there are none
    sampling: Sampling
    seed: int
    draws: tuple[str, str]  # state and increment of PCG64
    messages: int | None  # bytes of their JSON; None in a file of version 1
    sha256: str = UNSEALED  # of the header with these zeros, then of what stands behind it

    def arrays(self, layout: KVStateLayout) -> Tensors:
        """Return what stands behind the header, in order: the widest first, so all is aligned."""
        every = layout | {
            "logits": (np.dtype(np.float32), (self.logits,)),
            "tokens": (np.dtype(np.uint32), (self.tokens,)),
        }
        if self.messages is not None:
            every["messages"] = (np.dtype(np.uint8), (self.messages,))
        return dict(sorted(every.items(), key=lambda item: (-item[1][0].itemsize, item[0])))

    def to_bytes(self, layout: KVStateLayout) -> bytes:
        """Return length and JSON, padded to whole words."""
        metadata = {
            "format": _KIND.format,
            "format_version": _VERSION_1 if self.messages is None else _KIND.version,
            "session": self._session(),
            "sha256": self.sha256,
        }
        return header_bytes(metadata, self.arrays(layout), LENGTH.size)

    def digest(self, layout: KVStateLayout) -> Any:
        """Return a sha256 that has seen the header; what stands behind it is to follow."""
        return hashlib.sha256(replace(self, sha256=UNSEALED).to_bytes(layout))

    def _session(self) -> str:
        said = asdict(self.origin) | {
            name: getattr(self, name) for name in ("computed", "draws", "logits", "seed", "tokens")
        }
        if self.messages is not None:
            said["messages"] = self.messages
        said["sampling"] = asdict(self.sampling)
        return compact(said)

    @classmethod
    def parse(cls, data: bytes, where: str) -> SessionHeader:
        """Parse length and JSON. Raises `ArtifactError`."""
        metadata = _KIND.metadata(data, where, ("session", "sha256"))
        session = metadata.text("session", _OBJECT, "a JSON object as text")
        keys = (
            _FIELDS if metadata.values["format_version"] == _VERSION_1 else (*_FIELDS, "messages")
        )
        said = exact_fields(parse_json_object(session.encode(), where), f"{where}: session", keys)
        return _parsed(said, metadata.text("sha256", DIGEST, "64 hex digits"), where)


def write_session(path: Path, origin: Origin, state: SessionState, *, overwrite: bool) -> int:
    """Write a session, readable for its owner only; return the bytes of the file.

    It appears under its name in one rename, once it is on the disk. Raises `RequestError` for an
    existing file unless `overwrite` and for messages that are no JSON, `StorageError` when writing
    fails.
    """
    messages = _as_json(state.messages)
    header = _header_of(origin, state, len(messages))
    layout = {name: (array.dtype, array.shape) for name, array in state.kv.items()}
    with WholeFile(path, mode=0o600, overwrite=overwrite) as file:
        size = file.write(header.to_bytes(layout))
        digest = header.digest(layout)
        for data in _contents(header, layout, state, messages):
            digest.update(data)
            size += file.write(data)
        file.seek(0)
        file.write(replace(header, sha256=digest.hexdigest()).to_bytes(layout))
        file.publish()
    return size


class SessionFile:
    """An open file of a session; use it in a with-statement.

    Raises `ArtifactError` for what is no session, `CorruptionError` for one that is damaged and
    `StorageError` when reading fails.
    """

    def __init__(self, path: Path) -> None:
        self._where = str(path)
        self._file = self._open(path)
        try:
            with self._reading():
                self._head = _KIND.read(self._file, self._size, self._where)
            self._header = SessionHeader.parse(self._head, self._where)
        except BaseException:
            self._close()
            raise
        self.origin = self._header.origin

    def state(self, layout: Callable[[int], KVStateLayout], model: ModelSpec) -> SessionState:
        """Return the session, checked; its keys and values are mapped, to be copied.

        `layout` says what the model's keys and values of so many positions look like.
        """
        header = self._header
        room = model.max_position_embeddings + 1  # the last token chosen may stand behind
        if header.tokens > room or header.logits not in (0, model.vocab_size):
            raise ArtifactError(f"{self._where}: not a text of this model. {_COPY_AGAIN}")
        arrays = self._arrays(layout(header.computed))
        tokens = check_tokens(arrays.pop("tokens").tolist(), model.vocab_size)
        logits = arrays.pop("logits").copy()
        messages = arrays.pop("messages", None)
        return SessionState(
            messages=() if messages is None else _messages_of(messages.tobytes(), self._where),
            sampling=header.sampling,
            seed=header.seed,
            draws=_draws_of(*header.draws),
            tokens=tuple(tokens),
            computed=header.computed,
            logits=logits if logits.size else None,
            kv=arrays,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        with suppress(OSError):  # nothing was written, so nothing can be lost
            self._file.close()

    def _open(self, path: Path) -> BufferedReader:
        file, self._size = open_regular(path, "a session")
        return os.fdopen(file, "rb")

    def _arrays(self, layout: KVStateLayout) -> dict[str, NDArray[Any]]:
        """Return views of the mapped file, after all of it was checked."""
        header = self._header
        _KIND.check_same(self._head, header.to_bytes(layout), self._where)
        kinds = header.arrays(layout)
        expected = len(self._head) + data_bytes(kinds)
        if self._size != expected:
            raise CorruptionError(
                f"{self._where}: {self._size} bytes, expected {expected}. {_COPY_AGAIN}"
            )
        digest = header.digest(layout)
        with self._reading():
            while block := self._file.read(_BLOCK):
                digest.update(block)
            if digest.hexdigest() != header.sha256:
                raise CorruptionError(f"{self._where}: its sha256 is another one. {_COPY_AGAIN}")
            data = mmap.mmap(self._file.fileno(), self._size, access=mmap.ACCESS_READ)
        return tensor_views(data, len(self._head), kinds)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise not_read(self._where, error) from error


def _parsed(said: Fields, digest: str, where: str) -> SessionHeader:
    tokens = said.integer("tokens", 0, _MOST_TOKENS)
    computed = said.integer("computed", 0, tokens)
    overlays = said.texts("overlays", _NAME, "names of overlays")
    digests = said.texts("digests", DIGEST, "64 hex digits each")
    draws = said.texts("draws", _HALF, "32 hex digits each")
    logits = said.integer("logits", 0, _MOST_TOKENS)
    if (
        len(digests) != len(overlays)
        or len(draws) != 2
        or int(draws[1], 16) % 2 == 0
        or bool(logits) != (0 < tokens == computed)
    ):
        raise ArtifactError(f"{where}: its numbers cannot be those of a session. Save it again.")
    try:
        sampling = Sampling(
            **exact_fields(said.mapping("sampling"), where, asdict(Sampling())).values
        )
    except RequestError as error:
        raise ArtifactError(f"{where}: {error}") from error
    origin = Origin(
        said.text("identity", _NAME, "a model's identity"),
        said.text("artifact", DIGEST, "64 hex digits"),
        said.text("codec", _NAME, "a codec"),
        overlays,
        digests,
    )
    seed = said.integer("seed", 0, SEED_LIMIT - 1)
    messages = None
    if "messages" in said.values:
        messages = said.integer("messages", 0, _MOST_MESSAGES)
    return SessionHeader(
        origin, tokens, computed, logits, sampling, seed, (draws[0], draws[1]), messages, digest
    )


def _as_json(messages: Sequence[Message]) -> bytes:
    """Return messages as they stand in a file; none are no bytes. Raises `RequestError`."""
    if not messages:
        return b""
    try:
        found = json.dumps({"messages": list(messages)}, allow_nan=False).encode()
        _messages_of(found, "session.messages")
    except (ValueError, TypeError, RecursionError, ArtifactError) as error:
        raise RequestError(
            f"the session's messages are no JSON that can be kept: {error}. Keep texts, numbers, "
            "lists and objects in session.messages, each message with its role."
        ) from error
    return found


def _messages_of(data: bytes, where: str) -> tuple[Message, ...]:
    if not data:
        return ()
    parsed = parse_json_object(data, f"{where}: messages", _MOST_MESSAGES)
    found = exact_fields(parsed, f"{where}: messages", ("messages",)).values["messages"]
    every = found if isinstance(found, list) else [None]
    for number, each in enumerate(every):
        if not isinstance(each, dict) or not isinstance(each.get("role"), str):
            raise ArtifactError(f"{where}: message {number} is no object with a role.")
    return tuple(every)


def _contents(
    header: SessionHeader, layout: KVStateLayout, state: SessionState, messages: bytes
) -> Iterator[Any]:
    """Yield the bytes behind the header, an array at a time."""
    every: Mapping[str, NDArray[Any]] = {
        **state.kv,
        "logits": np.empty(0, np.float32) if state.logits is None else state.logits,
        "tokens": np.array(state.tokens, np.uint32),
        "messages": np.frombuffer(messages, np.uint8),
    }
    for name in header.arrays(layout):
        yield np.ascontiguousarray(every[name]).data.cast("B") if every[name].size else b""


def _header_of(origin: Origin, state: SessionState, messages: int) -> SessionHeader:
    inner = state.draws.bit_generator.state["state"]
    return SessionHeader(
        origin=origin,
        tokens=len(state.tokens),
        computed=state.computed,
        logits=0 if state.logits is None else state.logits.size,
        sampling=state.sampling,
        seed=state.seed,
        draws=(f"{inner['state']:032x}", f"{inner['inc']:032x}"),
        messages=messages,
    )


def _draws_of(state: str, increment: str) -> np.random.Generator:
    draws = random_draws(0)
    generator = draws.bit_generator
    inner = {"state": int(state, 16), "inc": int(increment, 16)}
    generator.state = {**generator.state, "state": inner}
    return draws
