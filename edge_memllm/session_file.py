"""A session in one safetensors file: keys and values, the text, and what has to be known.

The file may be hostile: all of it is checked before anything is used. Knows bytes and arrays;
nothing of generating.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from io import BufferedReader
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from edge_memllm.atomic import WholeFile
from edge_memllm.errors import ArtifactError, CorruptionError
from edge_memllm.manifest import ModelSpec
from edge_memllm.open_files import close_file, not_read
from edge_memllm.request import check_tokens
from edge_memllm.runtime_protocol import HeldLayout
from edge_memllm.sampling import random_draws
from edge_memllm.session_header import Header, array_bytes
from edge_memllm.session_state import Origin, SessionState
from edge_memllm.strict_json import MAX_JSON_BYTES
from edge_memllm.table_header import LENGTH

_COPY_AGAIN = "The file is incomplete or damaged; save the session again."
# O_NONBLOCK: opening a pipe must not wait for a writer.
_READING = (
    os.O_RDONLY
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)
_BLOCK = 1 << 20


def write_session(path: Path, origin: Origin, state: SessionState, *, overwrite: bool) -> int:
    """Write a session, readable for its owner only; return the bytes of the file.

    It appears under its name in one rename, once it is on the disk. Raises `RequestError` for an
    existing file unless `overwrite`, `StorageError` when writing fails.
    """
    header = _header_of(origin, state)
    layout = {name: (array.dtype, array.shape) for name, array in state.held.items()}
    with WholeFile(path, mode=0o600, overwrite=overwrite) as file:
        size = file.write(header.to_bytes(layout))
        digest = header.digest(layout)
        for data in _contents(header, layout, state):
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
            self._head = self._read_header()
            self._header = Header.parse(self._head[LENGTH.size :], self._where)
        except BaseException:
            self._close()
            raise
        self.origin = self._header.origin

    def state(self, layout: Callable[[int], HeldLayout], model: ModelSpec) -> SessionState:
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
        return SessionState(
            sampling=header.sampling,
            seed=header.seed,
            draws=_draws_of(*header.draws),
            tokens=tuple(tokens),
            computed=header.computed,
            logits=logits if logits.size else None,
            held=arrays,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        with suppress(OSError):  # nothing was written, so nothing can be lost
            self._file.close()

    def _open(self, path: Path) -> BufferedReader:
        try:
            file = os.open(path, _READING)
        except FileNotFoundError:
            raise ArtifactError(f"{path}: the file does not exist, expected a session.") from None
        except OSError as error:
            raise ArtifactError(f"{path}: cannot be opened ({error.strerror}).") from error
        with self._reading():
            status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            close_file(file)
            raise ArtifactError(f"{path}: this is not a regular file, expected a session.")
        self._size = status.st_size
        return os.fdopen(file, "rb")

    def _read_header(self) -> bytes:
        with self._reading():
            first = self._file.read(LENGTH.size)
            length = LENGTH.unpack(first)[0] if len(first) == LENGTH.size else 0
            if not 0 < length <= min(MAX_JSON_BYTES, self._size - LENGTH.size):
                raise ArtifactError(
                    f"{self._where}: this is not a saved session: {self._size} bytes, {length} of "
                    "them said to be a header."
                )
            return first + self._file.read(length)

    def _arrays(self, layout: HeldLayout) -> dict[str, NDArray[Any]]:
        """Return views of the mapped file, after all of it was checked."""
        header = self._header
        if header.to_bytes(layout) != self._head:
            raise ArtifactError(
                f"{self._where}: the header is not the one that its values and this model make. "
                f"{_COPY_AGAIN}"
            )
        kinds = header.arrays(layout)
        expected = len(self._head) + sum(array_bytes(*each) for each in kinds.values())
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
        return _views(data, len(self._head), kinds)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise not_read(self._where, error) from error


def _views(data: mmap.mmap, position: int, kinds: HeldLayout) -> dict[str, NDArray[Any]]:
    arrays = {}
    for name, (kind, shape) in kinds.items():
        count = int(np.prod(shape))
        arrays[name] = np.frombuffer(data, kind, count, position).reshape(shape)
        position += array_bytes(kind, shape)
    return arrays


def _contents(header: Header, layout: HeldLayout, state: SessionState) -> Iterator[Any]:
    """Yield the bytes behind the header, an array at a time."""
    every: Mapping[str, NDArray[Any]] = {
        **state.held,
        "logits": np.empty(0, np.float32) if state.logits is None else state.logits,
        "tokens": np.array(state.tokens, np.uint32),
    }
    for name in header.arrays(layout):
        yield np.ascontiguousarray(every[name]).data.cast("B") if every[name].size else b""


def _header_of(origin: Origin, state: SessionState) -> Header:
    inner = state.draws.bit_generator.state["state"]
    return Header(
        origin=origin,
        tokens=len(state.tokens),
        computed=state.computed,
        logits=0 if state.logits is None else state.logits.size,
        sampling=state.sampling,
        seed=state.seed,
        draws=(f"{inner['state']:032x}", f"{inner['inc']:032x}"),
    )


def _draws_of(state: str, increment: str) -> np.random.Generator:
    draws = random_draws(0)
    generator = draws.bit_generator
    inner = {"state": int(state, 16), "inc": int(increment, 16)}
    generator.state = {**generator.state, "state": inner}
    return draws
