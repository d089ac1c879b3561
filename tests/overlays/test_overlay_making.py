"""Overlays made by hand, from another table, and from what training changed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from edge_memllm.artifact.folder import Artifact
from edge_memllm.errors import RequestError
from edge_memllm.overlays import open_overlay, overlay_of
from edge_memllm.overlays.compatibility import check_same_but_rows, check_same_shape
from edge_memllm.overlays.making import (
    Alteration,
    checked_layers,
    edits_of,
    read_edits,
    write_difference,
    write_graft,
)
from edge_memllm.table.table import Table
from support.checkpoints import MakeArtifact
from support.overlays import laid_over, open_table, spec
from support.small_model import OTHER_IDENTITY, SmallArtifact, file_spec, write_artifact

EVERY = np.arange(24)


# --- by hand ---------------------------------------------------------------------------------


def test_alterations_do_what_they_say(table: Table) -> None:
    alterations = [
        Alteration((5, 3, 5), like=9),
        Alteration((7,), layers=(1,), like=9, strength=0.25),
        Alteration((8,), layers=(1, 0), scale=0.5),
        Alteration((2,), blank=True),
    ]
    base = table.rows(EVERY)
    expected = base.copy()
    expected[[3, 5]] = base[9]
    expected[7, 1] += np.float32(0.25) * (base[9, 1] - base[7, 1])
    expected[8] *= 0.5
    expected[2] = 0
    over = laid_over(table, overlay_of(spec(), edits_of(alterations, table)))
    np.testing.assert_allclose(over.rows(EVERY), expected, atol=0.02)
    np.testing.assert_array_equal(over.rows(EVERY)[[3, 5]], base[[9, 9]])


@pytest.mark.parametrize(
    ("ways", "message"),
    [
        ({}, "none of them given, expected one of scale, blank, like"),
        ({"scale": 2.0, "like": 3}, "scale and like given, expected one of"),
        ({"blank": True, "strength": 0.5}, "strength is given with blank; it goes with like"),
        ({"like": 3, "strength": float("nan")}, "strength is nan, expected a number of at most"),
    ],
)
def test_an_alteration_goes_one_way(ways: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Alteration((1,), **ways)  # type: ignore[arg-type]


def test_layers_that_are_not_there(table: Table) -> None:
    assert checked_layers(None, 3) == (0, 1, 2)
    assert checked_layers((2, 0, 2), 3) == (0, 2)
    with pytest.raises(RequestError, match="Layer 2: the model has memory rows 0 to 1"):
        edits_of([Alteration((1,), layers=(0, 2), blank=True)], table)


EDITS = """
[[edit]]
tokens = ["a", "b"]
layers = [0]
like = "c"
strength = 1

[[edit]]
tokens = ["d"]
blank = true
"""


def find(word: str) -> int:
    if word not in "abcd":
        raise RequestError(f"{word!r} is 2 tokens.")
    return "abcd".index(word)


def test_edits_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "e.toml").write_text(EDITS)
    first, second = read_edits(tmp_path / "e.toml", find)
    assert first == Alteration((0, 1), (0,), like=2, strength=1)
    assert second == Alteration((3,), blank=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[[edit", r"e.toml: this is not TOML in UTF-8"),
        ("a = " + "[" * 99_999, r"e.toml: this is not TOML in UTF-8"),
        ("a = " + "9" * 9_999, r"e.toml: this is not TOML in UTF-8"),
        ("", "found no list of edits, expected tables"),
        ("edit = 3", "found no list of edits"),
        ("edit = [3]", "e.toml, edit 1: found 3, expected a table"),
        ("tokens = 3", "found the key 'tokens', expected tables"),
        ("[[edit]]\nlike = 'a'", "edit 1: tokens is empty or missing"),
        ("[[edit]]\ntokens = 'a'", "edit 1: tokens is 'a', expected a list"),
        ("[[edit]]\ntokens = ['a']\nsize = 1", "edit 1: unknown key 'size', expected tokens"),
        (
            "[[edit]]\ntokens = ['a']\nscale = '1'",
            "scale is '1', expected a number from -65504 to 65504",
        ),
        ("[[edit]]\ntokens = ['a']\nscale = true", "scale is True, expected a number from"),
        (
            "[[edit]]\ntokens = ['a']\nlayers = [0.5]",
            "edit 1: layers is 0.5, expected an integer from 0 to 1023",
        ),
        ("[[edit]]\ntokens = ['xx']\nblank = true", "edit 1: 'xx' is 2 tokens"),
        ("[[edit]]\ntokens = ['a']", "edit 1: none of them given"),
    ],
)
def test_a_file_of_edits_that_is_wrong(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "e.toml").write_text(content)
    with pytest.raises(RequestError, match=message):
        read_edits(tmp_path / "e.toml", find)


# --- from another table ----------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["int8-g32", "f16", "f32"])
@pytest.mark.parametrize("donor_codec", ["int8-g32", "nf4-g32", "f32"])
def test_a_graft_brings_rows_over(table: Table, out: Path, codec: str, donor_codec: str) -> None:
    donor = open_table(write_artifact(out.parent / "donor", codec=donor_codec, seed=1))
    seen: list[tuple[str, int, int]] = []
    written = write_graft(
        out, spec(codec=codec), donor, [9, 4, 4], [1], progress=lambda *each: seen.append(each)
    )
    assert (written.entries, written.rows) == (2, 2)
    assert seen[-1] == ("copying", 2, 2)
    found = laid_over(table, open_overlay(out)).rows(EVERY)
    expected = table.rows(EVERY)
    expected[[4, 9], 1] = donor.rows(EVERY)[[4, 9], 1]
    np.testing.assert_allclose(found, expected, atol=0.02)
    if codec == "int8-g32" and donor_codec in (codec, "nf4-g32"):  # in the form of the table
        np.testing.assert_array_equal(found, expected)
    donor.close()


def changed_copy(small: SmallArtifact, path: Path, rows: dict[tuple[int, int], float]) -> Table:
    """The table of an artifact with some rows shifted."""
    random = np.random.default_rng(0)
    embedding = random.standard_normal((24, 64)).astype(np.float32)
    values = small.rows.copy()
    for at, shift in rows.items():
        values[at] += shift
    return open_table(_write(path, embedding, values))


def _write(path: Path, embedding: np.ndarray, rows: np.ndarray) -> SmallArtifact:
    from edge_memllm.table.writer import TableWriter

    made = write_artifact(path)
    (path / made.manifest.table.file).unlink()
    layout = made.manifest.layout
    with TableWriter(made.table, layout, 24, made.manifest.model.identity) as writer:
        writer.append(embedding, rows)
        table, file = writer.finish()
    made.rewrite_manifest(table=table, files=made.manifest.files | {table.file: file})
    return dataclasses.replace(made, rows=rows)


@pytest.mark.parametrize("chunk", [1, 1 << 23])
def test_a_difference_stores_what_changed(
    small: SmallArtifact, table: Table, out: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_memllm.overlays.making._CHUNK_BYTES", chunk)
    places = {(3, 1): 1.0, (7, 0): 0.5, (7, 1): 2.0}
    changed = changed_copy(small, out.parent / "changed", places)
    found = write_difference(out, spec(codec="int8-g32"), table, changed, 24)
    overlay = open_overlay(out)
    assert [(edit.token, edit.layer) for edit in overlay.edits()] == sorted(places)
    assert (found.written.entries, found.compared) == (3, 48)
    over = laid_over(table, overlay).rows(EVERY)
    np.testing.assert_array_equal(over, changed.rows(EVERY))
    changed.close()


def test_a_tolerance_leaves_small_differences_out(
    small: SmallArtifact, table: Table, out: Path
) -> None:
    changed = changed_copy(small, out.parent / "changed", {(3, 1): 0.05, (7, 0): 1.0})
    write_difference(out, spec(), table, changed, 24, tolerance=0.2)
    assert [edit.token for edit in open_overlay(out).edits()] == [7]
    changed.close()


def test_other_embeddings_are_refused(small: SmallArtifact, table: Table, out: Path) -> None:
    other = _write(out.parent / "other", np.ones((24, 64), np.float32), small.rows)
    changed = open_table(other)
    with pytest.raises(RequestError, match="The embedding of token 0 differs between the two"):
        write_difference(out, spec(), table, changed, 24)
    assert not out.exists()
    changed.close()


# --- what may be compared --------------------------------------------------------------------


def kin(small: SmallArtifact, path: Path, **options: object) -> SmallArtifact:
    return write_artifact(path, identity=OTHER_IDENTITY, seed=1, **options)  # type: ignore[arg-type]


def compare(small: SmallArtifact, other: SmallArtifact, tolerance: float = 0.0) -> None:
    with Artifact.open(small.path) as base, Artifact.open(other.path) as changed:
        check_same_shape(base, changed)
        check_same_but_rows(base, changed, tolerance=tolerance)


def replace_file(made: SmallArtifact, name: str, content: bytes) -> None:
    (made.path / name).write_bytes(content)
    made.rewrite_manifest(files=made.manifest.files | {name: file_spec(content)})


def test_kin_differ_in_identity_and_rows_only(small: SmallArtifact, tmp_path: Path) -> None:
    other = kin(small, tmp_path / "kin")
    for made in (small, other):
        graph = b"a graph of " + made.manifest.model.identity.encode()
        replace_file(made, "graph.onnx", graph)
    compare(small, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 3}, "memory.layers is 3, that of .*artifact is 2"),
        ({"vocab_size": 25}, "vocab_size is 25, that of"),
        ({"codec": "f16"}, "is stored as int8-g32, that of .* as f16: rounding alone"),
    ],
)
def test_kin_of_other_shapes(
    small: SmallArtifact, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        compare(small, kin(small, tmp_path / "kin", **options))


def test_kin_with_other_parts(small: SmallArtifact, tmp_path: Path) -> None:
    other = kin(small, tmp_path / "kin")
    model = other.manifest.model
    memory = dataclasses.replace(model.memory, gain=(1.0, 0.5))
    other.rewrite_manifest(model=dataclasses.replace(model, memory=memory))
    with pytest.raises(RequestError, match=r"memory.gain is \(1.0, 0.5\), that of"):
        compare(small, other)
    replace_file(other, "tokenizer.json", b"{ }")
    with pytest.raises(RequestError, match=r"tokenizer.json is not that of"):
        compare(small, other)
    (other.path / "tokenizer.json").write_bytes(b"{}\n")
    replace_file(other, "graph.onnx", b"another graph")
    with pytest.raises(RequestError, match=r"The graphs of .* differ, and overlays change"):
        compare(small, other, tolerance=0.1)


def test_nothing_differs_from_itself(make_artifact: MakeArtifact, out: Path) -> None:
    with Artifact.open(make_artifact()) as artifact:
        check_same_but_rows(artifact, artifact, tolerance=0)
        table = Table.open(artifact, "pread")
        wanted = spec(identity=artifact.manifest.model.identity)
        assert write_difference(out, wanted, table, table, 300).written.entries == 0
        table.close()
