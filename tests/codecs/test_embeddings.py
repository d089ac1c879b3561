"""How a record holds the embedding: within the codec's bound, fed in the graph's dtype."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edge_memllm.artifact.layout import RecordBuffer, RecordLayout, TableLayout
from edge_memllm.artifact.tensor_header import build_header
from edge_memllm.codecs import UnencodableRowError, codec_ids, embedding_form, get_codec
from support.ready_codecs import FOR_EMBEDDINGS, LOW_RANK, mixed
from support.small_model import IDENTITY

WIDTH = 256  # a multiple of every group size
DTYPES = ("float16", "float32")
OTHERS = [each for each in (*codec_ids(), *LOW_RANK) if each not in FOR_EMBEDDINGS]
EMBEDDINGS = arrays(
    np.float32, (3, WIDTH), elements=st.floats(-65024, 65024, width=32), fill=st.just(0.0)
)
# Five bits make 65536 of the first number.
BEYOND_FLOAT16 = np.zeros((3, WIDTH), np.float32)
BEYOND_FLOAT16[0, :2] = [63489, -61411]


@pytest.mark.parametrize("codec_id", FOR_EMBEDDINGS)
def test_the_largest_numbers_stay_numbers(codec_id: str) -> None:
    """A step of few bits is thousands wide there: half of one more is beyond float16."""
    form = embedding_form(WIDTH, "float16", codec_id)
    embedding = np.zeros((3, WIDTH), np.float32)
    embedding[:, :2] = [[-64875.54, 60358.758], [64875.54, -60358.758], [-64984.652, 60079.645]]
    fed = form.decode(form.encode(embedding))
    assert np.isfinite(fed).all()
    assert (np.abs(fed.astype(np.float64) - embedding) <= form.bound(embedding)).all()


@given(st.sampled_from(FOR_EMBEDDINGS), st.sampled_from(DTYPES), EMBEDDINGS)
def test_what_is_fed_is_within_the_bound(codec_id: str, dtype: str, embedding: np.ndarray) -> None:
    form = embedding_form(WIDTH, dtype, codec_id)
    stored = form.encode(embedding)
    assert (stored.dtype, stored.shape) == (np.uint8, (3, form.stored_bytes))
    fed = form.decode(stored)
    assert (fed.dtype, fed.shape) == (dtype, embedding.shape)
    assert fed.nbytes == 3 * form.fed_bytes
    assert np.isfinite(fed).all()
    error = np.abs(fed.astype(np.float64) - embedding)
    assert (error <= form.bound(embedding)).all()


@given(st.sampled_from(FOR_EMBEDDINGS), st.sampled_from(DTYPES), EMBEDDINGS)
@example("int5-g32", "float16", BEYOND_FLOAT16)
def test_a_record_holds_what_the_codec_makes_of_it(
    codec_id: str, dtype: str, embedding: np.ndarray
) -> None:
    codec = get_codec(codec_id)
    layout = RecordLayout(0, 0, get_codec("none"), dtype, 512, WIDTH, codec_id)
    scales, codes = codec.encode(embedding[:, None])
    buffer = RecordBuffer(layout, 4)
    for slot in range(3):
        (part,) = buffer.parts(slot)
        part[:] = scales[slot].tobytes() + codes[slot].tobytes()
    buffer.transcode(3)
    most = np.finfo(dtype).max.astype(np.float32)
    expected = codec.decode(scales, codes, 1, WIDTH)[:, 0].clip(-most, most).astype(dtype)
    np.testing.assert_array_equal(buffer.embedding(3), expected)
    np.testing.assert_array_equal(buffer.stored_embedding(3), layout.embedding.encode(embedding))
    assert not buffer.embedding(4)[3].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_codec_of_the_dtype_is_what_is_fed(dtype: str, random: np.random.Generator) -> None:
    embedding = random.standard_normal((3, WIDTH)).astype(np.float32)
    form = embedding_form(WIDTH, dtype)
    assert (form.codec.id, form.plain) == ({"float16": "f16", "float32": "f32"}[dtype], True)
    assert form.encode(embedding).tobytes() == embedding.astype(dtype).tobytes()
    named = RecordLayout(2, WIDTH, get_codec("f16"), dtype, embedding_codec=form.codec.id)
    unnamed = RecordLayout(2, WIDTH, get_codec("f16"), dtype)
    assert named == unnamed
    assert build_header(named, 24, IDENTITY) == build_header(unnamed, 24, IDENTITY)


@pytest.mark.parametrize("codec_id", OTHERS)
def test_codecs_that_are_not_for_embeddings(codec_id: str) -> None:
    with pytest.raises(ValueError, match=f"embedding codec {codec_id}: expected one that stores"):
        embedding_form(WIDTH, "float16", codec_id)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, "nan cannot be stored"),
        (np.inf, "inf cannot be stored"),
        (65100.0, "65100 cannot be stored, embeddings in float16 hold magnitudes up to 65024"),
    ],
)
def test_what_cannot_be_fed_is_not_stored(value: float, message: str) -> None:
    embedding = np.ones((3, WIDTH), np.float32)
    embedding[2, 5] = value
    with pytest.raises(UnencodableRowError, match=message) as caught:
        embedding_form(WIDTH, "float16", "int8-g32").encode(embedding)
    assert caught.value.row == 2


@pytest.mark.parametrize(
    ("layout", "header"),
    [
        (RecordLayout(2, WIDTH, get_codec("int8-g32"), "float16"), None),
        (RecordLayout(2, WIDTH, get_codec("int8-g32"), "float16", embedding_codec="f32"), "f32"),
        (mixed(24, width=WIDTH, embedding_codec="int6-g32"), "int6-g32"),
    ],
)
def test_the_header_names_another_codec(layout: TableLayout, header: str | None) -> None:
    assert layout.embedding_codec == header
    named = f'"embedding_codec":"{header}"'.encode()
    assert (named in build_header(layout, 24, IDENTITY)) == (header is not None)


@pytest.mark.parametrize("rows", ["f16", "int8-g32", "int4a-g32"])
def test_sizes_add_up(rows: str) -> None:
    plain = RecordLayout(2, WIDTH, get_codec(rows), "float16")
    layout = dataclasses.replace(plain, embedding_codec="int8-g32")
    assert layout.embedding_bytes == WIDTH + 2 * WIDTH // 32
    saved = 2 * WIDTH - layout.embedding_bytes
    assert plain.record_bytes - layout.record_bytes == saved
    assert layout.fed_bytes == plain.fed_bytes
    assert layout.buffer_bytes == plain.buffer_bytes + layout.embedding_bytes
    other = layout.with_codec(get_codec("int8-g64"))
    assert other.embedding_codec == "int8-g32"
