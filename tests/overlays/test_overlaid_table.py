"""A table under overlays: what each operation makes of rows, in every form a graph is fed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_memllm.artifact.layout import RecordBuffer
from edge_memllm.codecs import codec_ids
from edge_memllm.errors import CorruptionError, RequestError
from edge_memllm.overlays import Edit, Overlay
from edge_memllm.overlays.table import plain_codec
from edge_memllm.readers import reader_names
from edge_memllm.table.table import Table
from support.overlays import applied, every_operation, laid_over, made, open_table, row
from support.ready_codecs import LOW_RANK
from support.small_model import SmallArtifact, write_artifact

EVERY = np.arange(24)
CODECS = [each for each in (*codec_ids(), *LOW_RANK) if each != "none"]
TOUCHED = [(3, 0), (3, 1), (7, 0), (9, 1)]


def bytes_of(table: object) -> tuple[np.ndarray, np.ndarray]:
    """Scales and codes of all tokens, as the graph is fed them, [V, L, ...]."""
    buffer = RecordBuffer(table.layout, 24)  # type: ignore[attr-defined]
    table.fetch(EVERY, buffer)  # type: ignore[attr-defined]
    return buffer.wire_bytes(24)


def untouched() -> np.ndarray:
    mask = np.ones((24, 2), np.bool_)
    mask[tuple(zip(*TOUCHED, strict=True))] = False
    return mask


# --- operations and wire forms ---------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS)
def test_every_operation_on_every_codec(tmp_path: Path, codec: str) -> None:
    small = write_artifact(tmp_path / "artifact", codec=codec, width=256)
    edits = [
        Edit(each.token, each.layer, each.operation, each.row if each.row is None else row(5, 256))
        if each.operation != "scale"
        else each
        for each in every_operation()
    ]
    table = open_table(small)
    base = table.rows(EVERY)
    over = laid_over(table, made(edits, width=256))
    expected = applied(edits, base)
    plain = plain_codec(table.layout)
    bound = np.broadcast_to(plain.bound(expected), expected.shape)
    found = over.rows(EVERY)
    for at in TOUCHED:
        assert np.abs(found[at] - expected[at]).max() <= bound[at].max()
    assert not found[3, 1].any()
    for before, after in zip(bytes_of(table), bytes_of(over), strict=True):
        np.testing.assert_array_equal(after[untouched()], before[untouched()])
    np.testing.assert_array_equal(over.embeddings(EVERY), table.embeddings(EVERY))
    table.close()


@pytest.mark.parametrize("codec", ["f32", "f16", "int8-g32", "int4-g32", "nested8-g32", "nf4-g64"])
def test_a_row_in_the_form_of_the_table_reads_back_bit_equal(tmp_path: Path, codec: str) -> None:
    table = open_table(write_artifact(tmp_path / "artifact", codec=codec))
    plain = plain_codec(table.layout)
    stored = plain.encode(row(1)[None, None])
    over = laid_over(table, made([Edit(3, 1, "replace", row(1))], codec=plain.id))
    for found, expected in zip(bytes_of(over), stored, strict=True):
        np.testing.assert_array_equal(found[3, 1], expected[0])
    table.close()


@pytest.mark.parametrize(("codec", "zero"), [("int8-g32", 128), ("int4-g32", 0x88), ("f16", 0)])
def test_a_blank_row_is_exactly_zero(tmp_path: Path, codec: str, zero: int) -> None:
    table = open_table(write_artifact(tmp_path / "artifact", codec=codec))
    scales, codes = bytes_of(laid_over(table, made([Edit(4, 1, "blank")])))
    assert set(codes[4, 1]) == {zero}
    assert not scales[4, 1].any()
    table.close()


@pytest.mark.parametrize("codec", ["int8-g32", "int4-g32", "int6-g32"])
def test_a_scaled_row_keeps_its_codes(tmp_path: Path, codec: str) -> None:
    """So its error is that of rounding scales to float16, not of finding codes anew."""
    table = open_table(write_artifact(tmp_path / "artifact", codec=codec))
    over = laid_over(table, made([Edit(4, 1, "scale", factor=0.3)]))
    np.testing.assert_array_equal(bytes_of(over)[1], bytes_of(table)[1])
    expected = table.rows(EVERY)[4, 1] * np.float32(0.3)
    np.testing.assert_allclose(over.rows(EVERY)[4, 1], expected, rtol=2.0**-11)
    table.close()


def test_the_front_part_of_a_nested_table_is_changed_alike(tmp_path: Path) -> None:
    small = write_artifact(tmp_path / "artifact", codec="nested8-g32")
    table = open_table(small, quality="coarse")
    over = laid_over(table, made([Edit(3, 0, "replace", row(1))], codec="int8-g32"))
    assert np.abs(over.rows(EVERY)[3, 0] - row(1)).max() < 0.02
    np.testing.assert_array_equal(over.rows(EVERY)[4:], table.rows(EVERY)[4:])
    table.close()


@pytest.mark.parametrize("reader", [each for each in reader_names() if each != "auto"])
@pytest.mark.parametrize("cached", [0, 1 << 16])
def test_every_reader_and_the_record_cache(small: SmallArtifact, reader: str, cached: int) -> None:
    edits = every_operation()
    try:
        table = open_table(small, reader, record_cache_bytes=cached)
    except RequestError as error:
        pytest.skip(str(error))
    over = laid_over(table, made(edits))
    first = over.rows(EVERY)
    np.testing.assert_array_equal(over.rows(EVERY), first)  # now from the caches
    plain = open_table(small)
    np.testing.assert_array_equal(table.rows(EVERY), plain.rows(EVERY))  # the cache is the table's
    np.testing.assert_array_equal(laid_over(plain, made(edits)).rows(EVERY), first)
    plain.close()
    table.close()


# --- stacks ----------------------------------------------------------------------------------


def edit_of(token: int, layer: int) -> st.SearchStrategy[Edit]:
    rows = st.integers(0, 9).map(row)
    return st.one_of(
        st.builds(Edit, st.just(token), st.just(layer), st.just("replace"), rows),
        st.builds(Edit, st.just(token), st.just(layer), st.just("add"), rows),
        st.floats(-3, 3, width=32).map(lambda f: Edit(token, layer, "scale", factor=f)),
        st.just(Edit(token, layer, "blank")),
    )


overlays = st.dictionaries(
    st.tuples(st.integers(0, 3), st.integers(0, 1)), st.integers(0, 3), max_size=6
).flatmap(lambda places: st.tuples(*(edit_of(*place) for place in places)))


@settings(max_examples=60, deadline=None)
@given(stack=st.lists(overlays, max_size=4))
def test_a_stack_is_its_operations_in_order(f32: Table, stack: list[tuple[Edit, ...]]) -> None:
    expected = f32.rows(EVERY)
    for edits in stack:
        expected = applied(list(edits), expected)
    laid = [made(list(edits), f"o{number}") for number, edits in enumerate(stack)]
    found = laid_over(f32, *laid).rows(EVERY)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    one_by_one = f32
    for overlay in laid:
        one_by_one = laid_over(one_by_one, overlay)
    np.testing.assert_allclose(one_by_one.rows(EVERY), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def f32(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Table]:
    table = open_table(write_artifact(tmp_path_factory.mktemp("f32") / "artifact", codec="f32"))
    yield table
    table.close()


def test_parts_on_different_rows_are_the_whole_bit_for_bit(table: Table) -> None:
    edits = every_operation()
    whole = bytes_of(laid_over(table, made(edits)))
    parts = [made([edit], f"o{number}") for number, edit in enumerate(edits)]
    for order in (parts, parts[::-1]):
        for found, expected in zip(bytes_of(laid_over(table, *order)), whole, strict=True):
            np.testing.assert_array_equal(found, expected)


def test_what_was_replaced_in_its_own_form_can_be_scaled_and_added_to(table: Table) -> None:
    first = made([Edit(3, 0, "replace", row(1))], "first", codec="int8-g32")
    scaled = made([Edit(3, 0, "scale", factor=2)], "scaled")
    added = made([Edit(3, 0, "add", row(2))], "added")
    found = laid_over(table, first, scaled, added).rows(EVERY)[3, 0]
    assert np.abs(found - (2 * row(1) + row(2))).max() < 0.05


@pytest.mark.parametrize("edits", [[], None])
def test_an_empty_overlay_changes_nothing(table: Table, edits: list[Edit] | None) -> None:
    laid = [] if edits is None else [made(edits)]
    for found, expected in zip(bytes_of(laid_over(table, *laid)), bytes_of(table), strict=True):
        np.testing.assert_array_equal(found, expected)


# --- the surface of a table ------------------------------------------------------------------


def test_it_reads_and_announces_as_the_table_does(table: Table) -> None:
    over = laid_over(table, made(every_operation()))
    buffer = RecordBuffer(over.layout, 3)
    fetched = over.fetch(np.array([3, 0, 9]), buffer)
    assert fetched.bytes == 3 * table.layout.record_bytes
    assert table.statistics.bytes_read == fetched.bytes
    assert over.reader_name == "pread"
    over.announce([1, 2])


def test_it_refuses_what_the_table_refuses(table: Table, small: SmallArtifact) -> None:
    over = laid_over(table, made(every_operation()))
    with pytest.raises(RequestError, match="Token id 24 is not in the vocabulary"):
        over.rows(np.array([24]))
    place = table.locate(3)[0]
    content = bytearray(small.table.read_bytes())
    content[place] ^= 1
    small.table.write_bytes(content)
    with pytest.raises(CorruptionError, match="the record of token 3"):
        over.rows(np.array([3]))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Edit(3, 1, "scale", factor=65504), r"'a': token 3, layer 1: scaled by 65504 it is too"),
        (Edit(3, 1, "replace", np.full(64, 1e30)), "token 3, layer 1: 1e[+]30 cannot be stored"),
    ],
)
def test_values_beyond_the_wire_form_are_refused_by_name(
    tmp_path: Path, edit: Edit, message: str
) -> None:
    small = write_artifact(tmp_path / "artifact")
    table = open_table(small)
    large = made([Edit(3, 1, "scale", factor=1e3)], "before")
    over = laid_over(table, made([edit]))
    if edit.operation == "scale":
        over = laid_over(table, made([edit]), large)
        message = message.replace("'a'", "'a', 'before'").replace("65504 ", "6.5504e[+]07 ")
    with pytest.raises(RequestError, match=message):
        over.rows(np.array([1, 3]))
    over.rows(np.array([1]))  # others are not concerned
    table.close()


# --- caches and threads ----------------------------------------------------------------------


def whole_vocabulary() -> Overlay:
    return made([Edit(token, 0, "replace", row(token)) for token in range(24)], codec="int8-g32")


@pytest.mark.parametrize("cache_bytes", [0, 400, 1 << 20])
def test_what_is_kept_of_composed_rows_does_not_matter(table: Table, cache_bytes: int) -> None:
    over = laid_over(table, whole_vocabulary(), cache_bytes=cache_bytes)
    expected = laid_over(table, whole_vocabulary()).rows(EVERY)
    random = np.random.default_rng(0)
    for _ in range(20):
        ids = random.permutation(24)[:7]
        np.testing.assert_array_equal(over.rows(ids), expected[ids])
    assert over._changed._bytes <= cache_bytes


def test_threads_get_the_same_rows(table: Table) -> None:
    over = laid_over(table, whole_vocabulary(), cache_bytes=600)
    expected = laid_over(table, whole_vocabulary()).rows(EVERY)
    wrong: list[int] = []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(40):
            ids = random.permutation(24)[:9]
            if not np.array_equal(over.rows(ids), expected[ids]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
