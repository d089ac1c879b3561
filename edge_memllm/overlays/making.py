"""What overlays are made from: edits as people name them, or the rows of another model.

An edit says what becomes of these tokens in these layers: less, gone, or like another token. A
graft takes rows from a donor, a difference those that another table has otherwise. Knows where
rows come from and token ids; words become ids before.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_memllm.artifact.layout import RecordBuffer
from edge_memllm.checked_values import Fields, wrong_value
from edge_memllm.errors import RequestError
from edge_memllm.overlays.file import OverlayWriter, Written
from edge_memllm.overlays.overlay import LARGEST_FACTOR, MOST_LAYERS, Edit, OverlaySpec
from edge_memllm.overlays.table import plain_codec
from edge_memllm.progress import Progress
from edge_memllm.table.source import RecordSource

_KEYS = ("tokens", "layers", "scale", "blank", "like", "strength")
_WORD = re.compile(r"(?s).*")
_CHUNK_BYTES = 8 << 20  # of decoded rows


@dataclass(frozen=True, slots=True)
class Alteration:
    """What is to become of the rows of some tokens; exactly one of the three ways.

    `strength` is how far rows go towards those of the token `like`: 1 all the way. `layers` None
    means all. Raises `RequestError` for no way or several, and a strength without `like`.
    """

    tokens: tuple[int, ...]
    layers: tuple[int, ...] | None = None
    scale: float | None = None
    blank: bool = False
    like: int | None = None
    strength: float | None = None

    def __post_init__(self) -> None:
        ways = {"scale": self.scale is not None, "blank": self.blank, "like": self.like is not None}
        chosen = [name for name, given in ways.items() if given]
        if len(chosen) != 1:
            found = " and ".join(chosen) or "none of them"
            raise RequestError(f"{found} given, expected one of {', '.join(ways)}.")
        if self.strength is not None and self.like is None:
            raise RequestError(f"strength is given with {chosen[0]}; it goes with like.")
        if self.strength is not None and not abs(self.strength) <= LARGEST_FACTOR:  # or NaN
            raise RequestError(
                f"strength is {self.strength}, expected a number of at most {LARGEST_FACTOR:g}."
            )


def edits_of(alterations: Iterable[Alteration], table: RecordSource) -> list[Edit]:
    """Return the edits that alterations mean for the rows of a table.

    Raises `RequestError` for tokens or layers that are not there.
    """
    return [edit for each in alterations for edit in _edits(each, table)]


def checked_layers(layers: tuple[int, ...] | None, count: int) -> tuple[int, ...]:
    """Return the layers, None replaced by all. Raises `RequestError` for one that is not there."""
    wrong = [layer for layer in layers or () if not 0 <= layer < count]
    if wrong:
        raise RequestError(f"Layer {wrong[0]}: the model has memory rows 0 to {count - 1}.")
    return tuple(range(count)) if layers is None else tuple(sorted(set(layers)))


def _edits(wanted: Alteration, table: RecordSource) -> list[Edit]:
    tokens = sorted(set(wanted.tokens))
    layers = checked_layers(wanted.layers, table.layout.layers)
    pairs = [(token, layer) for token in tokens for layer in layers]
    if wanted.blank:
        return [Edit(*pair, "blank") for pair in pairs]
    if wanted.scale is not None:
        return [Edit(*pair, "scale", factor=wanted.scale) for pair in pairs]
    assert wanted.like is not None
    rows = table.rows(np.array(tokens))
    goal = table.rows(np.array([wanted.like]))[0]
    strength = np.float32(1 if wanted.strength is None else wanted.strength)
    moved = np.broadcast_to(goal, rows.shape) if strength == 1 else rows + strength * (goal - rows)
    return [
        Edit(token, layer, "replace", moved[tokens.index(token), layer]) for token, layer in pairs
    ]


def read_edits(path: Path, find: Callable[[str], int]) -> list[Alteration]:
    """Read alterations; `find` returns the token that a word is.

    Raises `RequestError` naming file, edit and key for what cannot be.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path}: this is not TOML in UTF-8 ({error}).") from error
    edits = content.pop("edit", [])
    if content or not isinstance(edits, list) or not edits:
        found = f"the key '{next(iter(content))}'" if content else "no list of edits"
        raise RequestError(f"{path}: found {found}, expected tables [[edit]] and nothing else.")
    return [_alteration(each, f"{path}, edit {n}", find) for n, each in enumerate(edits, 1)]


def _alteration(edit: Any, where: str, find: Callable[[str], int]) -> Alteration:
    if not isinstance(edit, dict):
        raise RequestError(f"{where}: found {edit!r:.80}, expected a table.")
    unknown = sorted(edit.keys() - set(_KEYS))
    if unknown:
        raise RequestError(f"{where}: unknown key '{unknown[0]}', expected {', '.join(_KEYS)}.")
    fields = Fields(edit, wrong_value)
    try:
        return _read(fields, find)
    except RequestError as error:
        raise RequestError(f"{where}: {error}") from error


def _read(fields: Fields, find: Callable[[str], int]) -> Alteration:
    words = fields.texts("tokens", _WORD, "words") if fields.value("tokens") else ()
    if not words:
        raise RequestError("tokens is empty or missing, expected words.")
    given = "layers" in fields.values
    like = fields.optional_text("like", _WORD, "a word")
    return Alteration(
        tokens=tuple(map(find, words)),
        layers=fields.integers("layers", 0, MOST_LAYERS - 1) if given else None,
        scale=fields.optional_number("scale", -LARGEST_FACTOR, LARGEST_FACTOR),
        blank=fields.flag("blank"),
        like=None if like is None else find(like),
        strength=fields.optional_number("strength", -LARGEST_FACTOR, LARGEST_FACTOR),
    )


@dataclass(frozen=True, slots=True)
class Difference:
    """How two tables differ, and the overlay that makes one of the other."""

    written: Written
    compared: int  # rows


def write_graft(
    path: str | os.PathLike[str],
    spec: OverlaySpec,
    donor: RecordSource,
    tokens: Sequence[int],
    layers: Sequence[int],
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Written:
    """Write an overlay that gives tokens the rows they have in `donor`, in some layers.

    Rows are copied byte for byte where the overlay's codec is the plain one of the donor's wire
    form. Raises as `OverlayWriter`, and as `Table.fetch`.
    """
    wanted = np.zeros(donor.layout.layers, np.bool_)
    wanted[list(layers)] = True
    with OverlayWriter(path, spec, overwrite=overwrite) as writer:
        ids = np.unique(np.array(tokens, np.int64))
        for chunk, buffer in _chunks(donor, ids, "copying", progress):
            mask = np.broadcast_to(wanted, (len(chunk), len(wanted)))
            _replace(writer, spec, buffer, chunk, mask)
        return writer.finish()


def write_difference(
    path: str | os.PathLike[str],
    spec: OverlaySpec,
    base: RecordSource,
    changed: RecordSource,
    vocab_size: int,
    *,
    tolerance: float = 0.0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Difference:
    """Write an overlay that makes the rows of `base` those of `changed`.

    Only rows that differ are stored: whose difference has a norm above `tolerance` times the norm
    of the base row. Raises `RequestError` for a token whose embedding differs, which no overlay
    can change.
    """
    ids = np.arange(vocab_size)
    chunks = _chunks(changed, ids, "comparing", progress)
    with OverlayWriter(path, spec, overwrite=overwrite) as writer:
        for chunk, buffer in chunks:
            before = RecordBuffer(base.layout, len(chunk))
            base.fetch(chunk, before)
            _check_embeddings(chunk, before, buffer)
            mask = differs(before.rows(len(chunk)), buffer.rows(len(chunk)), tolerance)
            _replace(writer, spec, buffer, chunk, mask)
        written = writer.finish()
    return Difference(written, vocab_size * spec.layers)


def differs(
    base: NDArray[np.float32], changed: NDArray[np.float32], tolerance: float
) -> NDArray[np.bool_]:
    """Return which rows [N, L] of two arrays [N, L, D] differ by more than the tolerance."""
    if not tolerance:
        return np.asarray((base != changed).any(axis=2))
    distance = np.linalg.norm(changed - base, axis=2)
    return np.asarray(distance > tolerance * np.linalg.norm(base, axis=2))


def _chunks(
    table: RecordSource, ids: NDArray[np.int64], stage: str, progress: Progress | None
) -> Iterator[tuple[NDArray[np.int64], RecordBuffer]]:
    """Yield tokens and the buffer that holds their records, valid until the next are asked for."""
    size = max(1, _CHUNK_BYTES // (4 * table.layout.layers * table.layout.width))
    buffer = RecordBuffer(table.layout, min(size, max(1, len(ids))))
    for start in range(0, len(ids), size):
        chunk = ids[start : start + size]
        table.fetch(chunk, buffer)
        yield chunk, buffer
        if progress is not None:
            progress(stage, start + len(chunk), len(ids))


def _replace(
    writer: OverlayWriter,
    spec: OverlaySpec,
    buffer: RecordBuffer,
    tokens: NDArray[np.int64],
    wanted: NDArray[np.bool_],
) -> None:
    """Write the rows [N, L] that are wanted of the records in a buffer."""
    at, layers = np.nonzero(wanted)
    if spec.codec == plain_codec(buffer.layout).id:
        scales, codes = buffer.wire_bytes(len(tokens))
        writer.replace_stored(tokens[at], layers, scales[at, layers], codes[at, layers])
    else:
        writer.replace(tokens[at], layers, buffer.rows(len(tokens))[at, layers])


def _check_embeddings(tokens: NDArray[np.int64], before: RecordBuffer, after: RecordBuffer) -> None:
    same = (before.embedding(len(tokens)) == after.embedding(len(tokens))).all(axis=1)
    if not same.all():
        raise RequestError(
            f"The embedding of token {tokens[int(same.argmin())]} differs between the two models, "
            "and overlays change memory rows only. Train with frozen embeddings."
        )
