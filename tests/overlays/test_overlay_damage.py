"""Overlay files that are damaged or made to do harm: each ends in a typed error."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_memllm.artifact.tensor_header import LENGTH
from edge_memllm.errors import ArtifactError, CorruptionError
from edge_memllm.overlays import open_overlay, write_overlay
from edge_memllm.overlays.file import COLUMNS, Header
from support.overlays import every_operation, spec
from support.small_model import flip

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left_open")


def metadata(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the JSON of a header, its length as before."""
    data = path.read_bytes()
    (length,) = LENGTH.unpack(data[:8])
    content = json.loads(data[8 : 8 + length])
    change(content)
    changed = json.dumps(content, sort_keys=True, separators=(",", ":")).encode().ljust(length)
    path.write_bytes(data[:8] + changed + data[8 + length :])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", "edge-memllm", "this is not an overlay .no format 'edge-memllm-overlay'"),
        ("format_version", "2", "overlay format version '2', this version reads '1'. Upgrade"),
        ("format_version", 1, "overlay format version 1, this version"),
        ("name", "a b", "The name of an overlay is 'a b'"),
        ("name", None, "name is null, expected text"),
        ("layers", "02", "layers is '02', expected a whole number as text"),
        ("layers", "9999", "layers is 9999, expected 1 to 1024"),
        ("codec", "f64", "stores rows as 'f64', expected one of"),
        ("rows", "5", "5 rows and 4 entries, expected at most one row for each entry"),
        ("rows", "1", "the header is not the one that its metadata make"),
        ("sha256", "abc", "sha256 is 'abc', expected 64 hex digits"),
        ("sha256", "0" * 64, "its sha256 is .*, the header says 000000000000"),
        ("more", "x", "unknown key 'more'"),
    ],
)
def test_headers_that_are_wrong(written: Path, key: str, value: Any, message: str) -> None:
    metadata(written, lambda content: content["__metadata__"].update({key: value}))
    with pytest.raises(ArtifactError, match=message):
        open_overlay(written)


def test_a_header_with_other_tensors(written: Path) -> None:
    metadata(written, lambda content: content["tokens"].update(dtype="I32"))
    with pytest.raises(ArtifactError, match="other tensors, places or spelling"):
        open_overlay(written)


def test_a_header_without_metadata(written: Path) -> None:
    metadata(written, lambda content: content.pop("__metadata__"))
    with pytest.raises(ArtifactError, match="this is not an overlay"):
        open_overlay(written)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "this is not an overlay: 0 bytes"),
        (b"\xff" * 100, "this is not an overlay: 100 bytes"),
        (LENGTH.pack(3) + b"[1]", "no JSON at its beginning"),
        (LENGTH.pack(4) + b'{"a}', "not valid JSON"),
    ],
)
def test_files_that_are_no_overlays(path: Path, content: bytes, message: str) -> None:
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=message):
        open_overlay(path)


def test_what_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="the file does not exist, expected an overlay"):
        open_overlay(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match="not a regular file"):
        open_overlay(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ArtifactError, match="not a regular file"):
        open_overlay(tmp_path / "pipe")


def test_a_file_cut_short_or_grown(written: Path) -> None:
    data = written.read_bytes()
    for content in (data[:-1], data + b"\0"):
        written.write_bytes(content)
        with pytest.raises(CorruptionError, match=f"{len(content)} bytes, expected {len(data)}"):
            open_overlay(written)


def resealed(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Write columns and rows as `change` leaves them, with a right digest."""
    found = open_overlay(path)
    columns = {name: getattr(found.entries, name).copy() for name in COLUMNS}
    columns["rows"] = found.rows.copy()
    change(columns)
    rows = columns.pop("rows")
    data = rows.tobytes() + b"".join(columns[name].tobytes() for name in COLUMNS)
    header = Header(found.spec, len(columns["tokens"]), len(rows)).sealed(hashlib.sha256(data))
    path.write_bytes(header.to_bytes() + data)


@pytest.mark.parametrize(
    ("column", "place", "value", "entry"),
    [
        ("tokens", 1, 2, 1),
        ("tokens", 3, 1 << 25, 3),
        ("layers", 1, 0, 1),
        ("layers", 2, 2, 2),
        ("operations", 0, 4, 0),
        ("places", 2, 0, 2),
        ("factors", 0, 0.5, 0),
        ("factors", 2, np.nan, 2),
        ("factors", 2, 1e6, 2),
    ],
)
def test_entries_that_cannot_be(
    written: Path, column: str, place: int, value: float, entry: int
) -> None:
    def change(columns: dict[str, Any]) -> None:
        columns[column][place] = value

    resealed(written, change)
    with pytest.raises(ArtifactError, match=rf"entry {entry} \(token .*cannot be"):
        open_overlay(written)


def test_rows_that_no_entry_has(written: Path) -> None:
    def change(columns: dict[str, Any]) -> None:
        columns["rows"] = np.concatenate([columns["rows"]] * 2)

    resealed(written, change)
    with pytest.raises(ArtifactError, match="4 rows, expected 2, one for each entry with a row"):
        open_overlay(written)


@pytest.mark.parametrize(("codec", "at"), [("f32", 2), ("f16", 1), ("int8-g32", 1)])
def test_rows_that_are_not_finite(path: Path, codec: str, at: int) -> None:
    write_overlay(path, spec(codec=codec), every_operation())

    def change(columns: dict[str, Any]) -> None:
        columns["rows"][1].view("<f4" if codec == "f32" else "<f2")[at] = np.inf

    resealed(path, change)
    with pytest.raises(ArtifactError, match="stored row 1 holds NaN or infinity"):
        open_overlay(path)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_is_found(one: Path, data: st.DataObject) -> None:
    content = one.read_bytes()
    flip(one, data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7)))
    try:
        with pytest.raises(ArtifactError):
            open_overlay(one)
    finally:
        one.write_bytes(content)


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=200), offset=st.integers(0, 4200), json_only=st.booleans())
def test_arbitrary_bytes_end_in_a_typed_error(
    one: Path, content: bytes, offset: int, json_only: bool
) -> None:
    before = one.read_bytes()
    if json_only:
        one.write_bytes(LENGTH.pack(len(content) + 1) + b"{" + content)
    else:
        one.write_bytes(before[:offset] + content + before[offset + len(content) :])
    try:
        open_overlay(one)
        assert one.read_bytes() == before
    except ArtifactError:
        pass
    finally:
        one.write_bytes(before)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("one") / "a.overlay.safetensors"
    write_overlay(path, spec(), every_operation())
    return path
