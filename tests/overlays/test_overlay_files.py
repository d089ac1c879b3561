"""Overlay files: written, read back, refused. Nothing wrong is taken for an overlay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from edge_memllm.errors import RequestError, StorageError
from edge_memllm.overlays import (
    Edit,
    Overlay,
    OverlaySpec,
    OverlayWriter,
    open_overlay,
    overlay_of,
    write_overlay,
)
from edge_memllm.overlays.file import COLUMNS
from support import TESTS
from support.overlays import every_operation, made, row, spec
from support.small_model import OTHER_IDENTITY, model_spec, write_artifact

pytestmark = pytest.mark.usefixtures("no_descriptor_is_left_open")

CODECS = ("f32", "f16", "int8-g32", "int8-g64", "int4-g32", "int4-g64")


def same(left: Overlay, right: Overlay) -> bool:
    columns = all(
        np.array_equal(getattr(left.entries, name), getattr(right.entries, name))
        for name in COLUMNS
    )
    return left.spec == right.spec and columns and np.array_equal(left.rows, right.rows)


# --- there and back --------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS)
def test_what_was_written_is_read(path: Path, codec: str) -> None:
    wanted = spec("b.1-x", codec=codec, description="Größer.\nZwei Zeilen 🙂")
    report = write_overlay(path, wanted, reversed(every_operation()))
    found = open_overlay(path)
    assert (report.entries, report.rows, report.bytes) == (4, 2, path.stat().st_size)
    assert found.spec == wanted
    assert same(found, overlay_of(wanted, every_operation()))
    _, rows = zip(*((e.token, e.row) for e in found.edits() if e.row is not None), strict=True)
    expected = wanted.stored.encode(np.stack([row(1), row(2)])[:, None])
    np.testing.assert_array_equal(np.stack(rows), wanted.stored.decode(*expected, 1, 64)[:, 0])
    assert [(e.token, e.layer, e.operation, e.factor) for e in found.edits()] == [
        (e.token, e.layer, e.operation, e.factor) for e in every_operation()
    ]


def test_it_is_an_ordinary_safetensors_file(written: Path) -> None:
    found = load_file(written)
    assert found["tokens"].tolist() == [3, 3, 7, 9]
    assert found["places"].tolist() == [0, 1, 1, 1]
    assert found["factors"].tolist() == [1, 1, -0.5, 1]
    assert found["operations"].tolist() == [0, 3, 2, 1]
    np.testing.assert_array_equal(found["rows"].view("<f4")[0], row(1))


def test_equal_edits_give_equal_bytes_and_nothing_else_lies_there(written: Path) -> None:
    before = written.read_bytes()
    write_overlay(written, spec(), reversed(every_operation()), overwrite=True)
    assert written.read_bytes() == before
    assert [each.name for each in written.parent.iterdir()] == [written.name]


def test_an_empty_overlay(path: Path) -> None:
    write_overlay(path, spec(), [])
    assert len(open_overlay(path)) == 0
    assert list(open_overlay(path).edits()) == []


def test_the_writer_takes_many_at_a_time(path: Path) -> None:
    rows = np.stack([row(seed) for seed in range(4)])
    wanted = spec(codec="int8-g32")
    scales, codes = wanted.stored.encode(rows[2:, None])
    with OverlayWriter(path, wanted) as writer:
        writer.replace([1, 1], np.array([0, 1]), rows[:2])
        writer.replace_stored([2, 3], [0, 1], scales, codes)
        writer.add([4], [0], rows[:1])
        writer.scale([5, 6], [0, 0], 0.25)
        writer.blank([7], [1])
        writer.finish()
    edits = [
        *(Edit(token, layer, "replace", rows[n]) for n, (token, layer) in enumerate(PLACES)),
        Edit(4, 0, "add", rows[0]),
        Edit(5, 0, "scale", factor=0.25),
        Edit(6, 0, "scale", factor=0.25),
        Edit(7, 1, "blank"),
    ]
    assert same(open_overlay(path), overlay_of(wanted, edits))


PLACES = [(1, 0), (1, 1), (2, 0), (3, 1)]


def test_an_overlay_stays_readable_when_its_file_is_replaced(written: Path) -> None:
    found = open_overlay(written)
    write_overlay(written, spec(), [], overwrite=True)
    assert same(found, made(every_operation()))


def test_rows_stay_on_storage(path: Path) -> None:
    """A large overlay takes no memory of the process's own: it is mapped."""
    rows = np.ones((4000, 1024), np.float32)
    with OverlayWriter(path, spec(layers=8, width=1024)) as writer:
        for token in range(0, 8000, 500):
            tokens = np.repeat(np.arange(token, token + 500), 8)
            writer.replace(tokens, np.tile(np.arange(8), 500), rows)
        writer.finish()
    script = (
        "import sys, numpy as np; from edge_memllm.statistics import process_memory as p\n"
        "from edge_memllm.overlays import open_overlay\n"
        "before = p().anon_bytes; found = open_overlay(sys.argv[1])\n"
        "found.find(np.arange(100)); print(p().anon_bytes - before)"
    )
    command = [sys.executable, "-c", script, str(path)]
    taken = int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    assert path.stat().st_size > 250_000_000
    assert taken < 20_000_000


# --- refused when written --------------------------------------------------------------------

WRONG_EDITS: list[tuple[list[Edit], str]] = [
    ([Edit(1, 0, "blank"), Edit(1, 0, "scale", factor=2)], "a second operation on token 1, layer"),
    ([Edit(-1, 0, "blank")], "token -1, expected 0 to 16777215"),
    ([Edit(1 << 24, 0, "blank")], "token 16777216, expected"),
    ([Edit(1, 2, "blank")], "layer 2, expected 0 to 1"),
    ([Edit(1, 0, "replace")], "replace with no row. A row goes with replace and add"),
    ([Edit(1, 0, "blank", row(1))], "token 1, layer 0: blank with a row"),
    ([Edit(1, 0, "blank", factor=2)], "blank with the factor 2, which only scale has"),
    ([Edit(1, 0, "scale", factor=float("nan"))], "the factor is nan, expected a number"),
    ([Edit(1, 0, "scale", factor=1e6)], "the factor is 1000000.0, expected a number from -65504"),
    ([Edit(1, 0, "double")], "the operation is 'double', expected one of replace, add"),  # type: ignore[arg-type]
    ([Edit(1, 0, "add", row(1)[:5])], r"rows \[1, 5\], expected \[1, 64\]"),
    ([Edit(1, 1, "add", row(1) * np.nan)], "token 1, layer 1: nan cannot be stored"),
]


@pytest.mark.parametrize(("edits", "message"), WRONG_EDITS)
def test_edits_that_cannot_be(path: Path, edits: list[Edit], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        overlay_of(spec(), edits)
    with pytest.raises(RequestError, match=message):
        write_overlay(path, spec(), edits)
    assert not list(path.parent.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a b"}, "The name of an overlay is 'a b', expected up to 64 letters"),
        ({"name": "all"}, "and not 'all' or 'none'"),
        ({"name": ""}, "The name of an overlay is ''"),
        ({"identity": "sha256:12"}, "is for model 'sha256:12', expected 'sha256:' and 64"),
        ({"layers": 0}, "layers is 0, expected 1 to 1024"),
        ({"width": 1 << 18}, "width is 262144, expected 1 to 131072"),
        ({"codec": "nf4-g32"}, "stores rows as 'nf4-g32', expected one of f32, f16, int8-g32"),
        ({"codec": "int8-g128"}, "width 64 is not a multiple of the group size 128"),
        ({"description": "\x1b[2J"}, "has 4 characters, expected at most 2000, all of them prin"),
        ({"description": "x" * 2001}, "has 2001 characters"),
    ],
)
def test_a_spec_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        OverlaySpec(**{"name": "a", **_fields(), **changes})


def _fields() -> dict[str, Any]:
    return {"identity": OTHER_IDENTITY, "layers": 2, "width": 64}


def test_the_writer_wants_ascending_order(path: Path) -> None:
    with OverlayWriter(path, spec()) as writer:
        writer.blank([4], [1])
        with pytest.raises(RequestError, match="not in ascending order: token 4, layer 0"):
            writer.blank([4], [0])
    assert not list(path.parent.iterdir())


def test_a_file_is_only_replaced_when_asked(written: Path) -> None:
    before = written.read_bytes()
    with pytest.raises(RequestError, match="there is a file already"):
        write_overlay(written, spec(), [])
    assert written.read_bytes() == before
    assert [each.name for each in written.parent.iterdir()] == [written.name]


def test_a_file_that_appears_meanwhile_is_not_replaced(path: Path) -> None:
    with OverlayWriter(path, spec()) as writer:
        path.write_bytes(b"theirs")
        with pytest.raises(RequestError, match="there is a file already"):
            writer.finish()
    assert path.read_bytes() == b"theirs"
    assert [each.name for each in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["a.safetensors", ".overlay.safetensors", "a"])
def test_the_name_of_a_file_says_what_it_is(tmp_path: Path, name: str) -> None:
    with pytest.raises(RequestError, match=r"expected a name that ends in '\.overlay\.safetensors"):
        write_overlay(tmp_path / name, spec(), [])


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot be written .No such file.*Make the folder"):
        write_overlay(tmp_path / "nowhere" / "a.overlay.safetensors", spec(), [])


def test_a_full_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StorageError, match=r"cannot be written .No space left on device"):
        write_overlay(path, spec(), every_operation())
    monkeypatch.undo()
    assert not list(path.parent.iterdir())


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_writer_leaves_nothing_under_the_name(path: Path, signal_number: int) -> None:
    script = (
        "import sys, time; from support.overlays import *; from edge_memllm.overlays import *\n"
        "with OverlayWriter(sys.argv[1], spec()) as writer:\n"
        "    writer.replace([1], [0], row(1)[None]); print('there', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(
        command, cwd=TESTS, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"there\n"
        process.send_signal(signal_number)
    left = [each.name for each in path.parent.iterdir()]
    assert path.name not in left
    assert left == [] or signal_number == signal.SIGKILL  # a hidden .partial file at most
    write_overlay(path, spec(), every_operation())
    assert list(path.parent.iterdir()) == [path]


# --- does it fit -----------------------------------------------------------------------------


def test_an_overlay_for_another_model(tmp_path: Path) -> None:
    manifest = write_artifact(tmp_path / "artifact").manifest
    made(every_operation()).check_fits(manifest)
    with pytest.raises(
        RequestError, match=r"'a' is for model sha256:.*, this is sha256:.*an export"
    ):
        made([], identity=OTHER_IDENTITY).check_fits(manifest)
    with pytest.raises(RequestError, match="rows of 3 layers of 64, the model has 2 of 64"):
        made([], layers=3).check_fits(manifest)
    with pytest.raises(RequestError, match="a row of token 24, the model has 24 tokens"):
        made([Edit(24, 0, "blank")]).check_fits(manifest)


def test_the_spec_of_a_model(tmp_path: Path) -> None:
    manifest = write_artifact(tmp_path / "artifact").manifest
    assert OverlaySpec.for_model(manifest, "a", codec="f32") == spec()
    dense = write_artifact(tmp_path / "dense", codec="none").manifest
    assert dense.model == model_spec(dense.model.identity, 8, 2, 64, 24)
    with pytest.raises(RequestError, match=r"without token memory .* has no memory rows"):
        OverlaySpec.for_model(dense, "a")
