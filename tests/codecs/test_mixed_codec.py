"""Mixed precision: every class keeps the contract of codecs, and the allocation is checked."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_codec_graph import rows_graph
from test_codecs import check_codec, rows_of

from edge_memllm.artifact.layout import RecordBuffer, RecordLayout
from edge_memllm.artifact.sections import MixedLayout, named_layout
from edge_memllm.codecs import Codec, embedding_form, get_codec
from edge_memllm.codecs.layered import PARTS, Allocation, TokenClass
from support.ready_codecs import MIXED, mixed, ready_mixed

WIDTH = 256
EVERY_CLASS = range(len(MIXED))


def variant(number: int) -> Codec:
    return ready_mixed(WIDTH).kinds[number].codec


@pytest.mark.parametrize("number", EVERY_CLASS)
@pytest.mark.parametrize("search", [False, True])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_contract_of_every_class(number: int, search: bool, data: st.DataObject) -> None:
    codec = variant(number)
    assert codec.searches
    check_codec(codec, data.draw(rows_of(codec)), search=search)


@pytest.mark.parametrize("number", EVERY_CLASS)
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 2.0**-24, 6e-5, "limit"])
def test_contract_at_the_edges(number: int, value: float | str) -> None:
    codec = variant(number)
    rows = np.zeros((2, 2, WIDTH), np.float32)
    rows[0] = codec.limit if value == "limit" else float(value)
    rows[1, 0, 5] = -rows[0, 0, 0]
    check_codec(codec, rows)


@pytest.mark.parametrize("part", PARTS)
def test_each_layer_is_stored_as_its_codec_stores_it(
    part: str, random: np.random.Generator
) -> None:
    """Codes, and values decoded, are those of the codec alone; only groups become smaller."""
    rows = random.standard_normal((20, 2, WIDTH)).astype(np.float32)
    alone = get_codec(part)
    layout = mixed(20, ((part, "int8-g32"),), WIDTH)
    fit = layout.fit()
    fit.add(rows)
    layout = layout.with_parameters(fit.parameters())
    if alone.parameters_bytes(1, WIDTH):
        alone = alone.with_parameters(layout.parameters[20:], 1, WIDTH)
    only = layout.kinds[0].codec
    stored, expected = only.encode(rows), alone.encode(rows[:, :1])
    for found, wanted in zip(stored, expected, strict=True):
        np.testing.assert_array_equal(found[:, : wanted.shape[1]], wanted)
    decoded = only.decode(*stored, 2, WIDTH)
    np.testing.assert_array_equal(decoded[:, :1], alone.decode(*expected, 1, WIDTH))


def test_bytes_never_change() -> None:
    """Two layers of 0, 1, -2, 0.5 and zeros: int5, then four levels with the group doubled."""
    rows = np.zeros((2, 2, 64), np.float32)
    rows[:, :, :4] = [0.0, 1.0, -2.0, 0.5]
    allocation = Allocation(
        (("int5-g32", "codebook2-g64"), ("int6-g64", "int4-g32")), np.array([1, 0], np.uint8)
    )
    levels = np.array([-61, -7, 44, 127], np.int8).tobytes()
    like = RecordLayout(2, 64, get_codec("f32"), "float16")
    layout = MixedLayout.of(like, allocation).with_parameters(b"\x01\x00" + levels)
    both = zip(layout.kinds, rows, strict=True)
    first, second = (kind.codec.encode(row[None]) for kind, row in both)
    assert first[0].tobytes().hex() == "0030000009a4"
    assert first[1].tobytes().hex() == "10030a2184" + "1042082184" * 7 + "71" + "55" * 15
    assert second[0].tobytes().hex() == "002c00340000"
    assert second[1].tobytes().hex() == "200ca0" + "200882" * 15 + "c8a0" + "88" * 30
    assert (layout.codec_id, layout.parameters[:2]) == ("mixed-g32", b"\x01\x00")


def test_graph_and_codec_agree_bit_for_bit(random: np.random.Generator) -> None:
    """Slots of different classes side by side in one buffer."""
    layout = ready_mixed(WIDTH, "float32")
    codecs = [kind.codec for kind in layout.kinds]
    rows = random.standard_normal((9, 2, WIDTH)).astype(np.float32)
    classes = [3, 0, 5, 3, 1, 2, 0, 4, 3]
    buffer = RecordBuffer(layout, 10)
    for slot, number in enumerate(classes):
        stored = codecs[number].encode(rows[slot : slot + 1])
        for target, part in zip(buffer.parts(slot, number)[1:], stored, strict=True):
            target[:] = part[0].data
    buffer.transcode(9, classes)
    session: onnxruntime.InferenceSession = rows_graph(codecs[0])
    feeds = {
        "token_index": np.arange(9).reshape(1, -1),
        "embedding": buffer.embedding(9),
        "memory_gain": np.ones(2, np.float32),
        **buffer.wire(9),
    }
    (found, _) = session.run(None, feeds)
    np.testing.assert_array_equal(found[0], buffer.rows(9))
    for slot, number in enumerate(classes):
        stored = codecs[number].encode(rows[slot : slot + 1])
        expected = codecs[number].decode(*stored, 2, WIDTH)[0]
        np.testing.assert_array_equal(found[0, slot], expected)


def test_sizes_are_those_of_the_largest_class() -> None:
    layout = ready_mixed(WIDTH)
    sizes = [each.record_bytes for each in layout.kinds]
    assert layout.record_bytes == max(sizes) > min(sizes)
    counts = layout.counts(600)
    assert sum(counts) == 600
    assert layout.records_bytes(600) == sum(
        count * each.stride for count, each in zip(counts, layout.kinds, strict=True)
    )
    assert layout.payload_bytes(600) == len(layout.parameters) + sum(
        count * size for count, size in zip(counts, sizes, strict=True)
    )
    assert layout.fed_bytes == 2 * WIDTH + 2 * WIDTH + 2 * WIDTH // 32 * 2
    # The most scales and the most codes need not be of the same class.
    most = [max(each.codec.sizes(2, WIDTH).scales_bytes for each in layout.kinds)]
    most.append(max(each.codec.sizes(2, WIDTH).codes_bytes for each in layout.kinds))
    assert layout.buffer_bytes == layout.fed_bytes + sum(most)


def test_stored_order_is_class_by_class() -> None:
    layout = ready_mixed(WIDTH)
    order = layout.stored_order(600)
    assert sorted(order) == list(range(600))
    classes = layout.class_of[order]
    assert (np.diff(classes.astype(int)) >= 0).all()
    for number in EVERY_CLASS:
        assert (np.diff(order[classes == number]) > 0).all()
    assert RecordLayout(2, WIDTH, get_codec("f16"), "float16").stored_order(3).tolist() == [0, 1, 2]


# --- learning --------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 600])
def test_levels_are_learned_class_by_class(chunk: int, random: np.random.Generator) -> None:
    layout = mixed(600, (("codebook3-g32",), ("codebook3-g32",)), 32)
    order = layout.stored_order(600)
    rows = random.uniform(-1, 1, (600, 1, 32)).astype(np.float32)
    rows[layout.class_of == 1] **= 5
    weights = random.integers(1, 9, 600).astype(np.float32)
    fit = layout.fit()
    for start in range(0, 600, chunk):
        part = order[start : start + chunk]
        fit.add(rows[part], weights[part])
    assert fit.parameters()[:600] == layout.class_of.tobytes()
    for number in (0, 1):
        alone = get_codec("codebook3-g32").fit(1, 32)
        mine = layout.class_of == number
        alone.add(rows[mine], weights[mine])
        place = 600 + 8 * number
        assert fit.parameters()[place : place + 8] == alone.parameters()


def test_parameters_survive_being_stored() -> None:
    layout = ready_mixed(WIDTH)
    assert len(layout.parameters) == layout.parameters_bytes
    again = named("mixed-g32", layout.classes).with_parameters(layout.parameters)
    assert (again.parameters, again.classes, again.codec_id) == (
        layout.parameters,
        layout.classes,
        layout.codec_id,
    )
    np.testing.assert_array_equal(again.class_of, layout.class_of)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda data: data[1:], "bytes of parameters, expected"),
        (lambda data: data + b"x", "bytes of parameters, expected"),
        (lambda data: data[1:2] + data[1:], r"classes of 297, 303 tokens, expected 296, 304"),
        (lambda data: b"\xff" + data[1:], r"classes of .*, 0, \.\.\. tokens, expected"),
        (lambda data: data[:-1] + b"\x7e", r"the levels of layer 0 are \[.*126\], expected numb"),
    ],
)
def test_parameters_that_cannot_be(change: Callable[[bytes], bytes], match: str) -> None:
    layout = mixed(600, (("codebook3-g64", "int8-g32"), ("int4-g32", "codebook2-g32")))
    fit = layout.fit()
    fit.add(np.ones((600, 2, 64), np.float32))
    bare = named("mixed-g32", layout.classes, width=64)
    with pytest.raises(ValueError, match=match):
        bare.with_parameters(change(fit.parameters()))


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "class_of", "match"),
    [
        ((), [], "0 classes of tokens, expected 1 to 16"),
        ((("int8-g32",),) * 17, list(range(17)), "17 classes of tokens, expected 1 to 16"),
        ((("int8-g32",), ("int8-g32",)), [0, 0], "class 1 has 0 tokens, expected at least one"),
        ((("int8-g32",),), [0, 1], "token 1 is of class 1, expected one from 0 to 0"),
        (((),), [0], "class 0 has codecs for 0 layers"),
        ((("int8-g32",), ("int8-g32",) * 2), [0, 1], "class 1 has codecs for 2 layers, class 0 fo"),
        (
            (("f16",),),
            [0],
            "class 0: codec 'f16' cannot be mixed with others, expected one of int8",
        ),
    ],
)
def test_allocations_that_cannot_be(
    classes: tuple[tuple[str, ...], ...], class_of: list[int], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        Allocation(classes, np.array(class_of, np.uint8))


@pytest.mark.parametrize("class_of", [np.zeros((2, 2), np.uint8), np.zeros(2, np.int64)])
def test_classes_of_tokens_are_bytes(class_of: np.ndarray) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{class_of.dtype} {class_of.shape}, expected")):
        Allocation((("int8-g32",),), class_of)


def test_every_part_is_a_codec_that_can_be_mixed() -> None:
    layout = mixed(len(PARTS[:16]), tuple((part, part) for part in PARTS[:16]), WIDTH)
    assert [each.codec.sizes(2, WIDTH) for each in layout.kinds] == [
        get_codec(part).sizes(2, WIDTH) for part in PARTS[:16]
    ]
    assert all(get_codec(part).wire in ("q8", "q4") for part in PARTS)


def test_the_id_is_that_of_the_smallest_group() -> None:
    assert mixed(8, (("int8-g128",), ("int4-g64",)), WIDTH).codec_id == "mixed-g64"
    with pytest.raises(
        ValueError, match="codec mixed-g32: the smallest group of its classes is 64"
    ):
        named("mixed-g32", (TokenClass(1, ("int8-g64",)),), layers=1)


def test_what_is_missing_is_named() -> None:
    only = (TokenClass(1, ("int8-g32",)),)
    with pytest.raises(ValueError, match="codec mixed-g32: without classes of tokens"):
        named("mixed-g32", None)
    with pytest.raises(ValueError, match="codec mixed-g32: which token is of which class is not"):
        named("mixed-g32", only, layers=1).fit()
    with pytest.raises(ValueError, match="mixed-g32, class 0: there are 3 layers, it has codecs f"):
        named("mixed-g32", ready_mixed(WIDTH).classes, layers=3)
    with pytest.raises(ValueError, match="codec int8-g32: has no classes of tokens, found 1"):
        named("int8-g32", only)
    with pytest.raises(ValueError, match="codec mixed-g32 without memory layers"):
        named("mixed-g32", only, layers=0)


def named(
    codec_id: str, classes: tuple[TokenClass, ...] | None, layers: int = 2, width: int = WIDTH
) -> MixedLayout:
    """The layout that a manifest names."""
    return named_layout(
        codec_id,
        classes,
        layers=layers,
        width=width,
        embedding=embedding_form(width, "float16"),
        alignment=512,
    )
