"""The head of a GGUF file is read as the gguf library reads it, and no byte of it is trusted."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_memllm.errors import ExportError
from edge_memllm_export.sources.gguf_file import GGUFFile
from edge_memllm_export.sources.gguf_header import GGUFHeader, read_header
from support.gguf_files import metadata_of, random_model, stored_tensors, write_gguf

METADATA: dict[str, Any] = {
    "general.name": "Räksmörgås \u2603",
    "a.number": 4_000_000_000,
    "a.float": 9.999999747378752e-06,
    "a.truth": True,
    "some.texts": ["", "a", " ", "\u2581\u2581"],
    "some.floats": np.array([0.5, -1e9], np.float32),
    "some.truths": np.array([True, False]),
}


def head(data: bytes) -> GGUFHeader:
    return read_header(memoryview(data), "m.gguf")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small file with metadata of every kind, three tensors and a tokenizer."""
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    tensors = {
        "one": np.arange(6, dtype=np.float32),
        "two": np.ones((3, 32), np.float32),
        "three": np.zeros((2, 64), np.float32),
    }
    return write_gguf(path, "llama", METADATA, tensors, GGMLQuantizationType.Q8_0).read_bytes()


def test_it_is_read_as_the_library_reads_it(file: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(file)
    reader, found = gguf.GGUFReader(tmp_path / "m.gguf"), head(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields.keys() - found.metadata.keys() == {
        *("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count")
    }
    for key, value in found.metadata.items():
        listed = value.tolist() if isinstance(value, np.ndarray) else value
        assert fields[key] == listed if key != "a.float" else listed == 1e-5
    for tensor in reader.tensors:
        stored = found.tensors[tensor.name]
        assert stored.kind == tensor.tensor_type
        assert stored.shape == tuple(tensor.shape[::-1].tolist())
        assert (stored.offset, stored.size) == (tensor.data_offset, tensor.n_bytes)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=12),
        st.one_of(
            st.integers(0, 2**32 - 1),
            st.booleans(),
            st.text(max_size=40),
            st.lists(st.text(max_size=9), min_size=1, max_size=9),
            st.floats(width=32, allow_nan=False),
        ),
        max_size=6,
    )
)
def test_any_metadata_that_the_library_writes_is_read(
    tmp_path_factory: pytest.TempPathFactory, metadata: dict[str, Any]
) -> None:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_gguf(path, "llama", metadata, {})
    found = {**head(path.read_bytes()).metadata}
    if "general.architecture" not in metadata:
        assert found.pop("general.architecture") == "llama"
    assert found.keys() == metadata.keys()
    for key, value in metadata.items():
        assert type(found[key]) is type(value)
        if isinstance(value, float):
            assert np.float32(found[key]) == np.float32(value)
        else:
            assert found[key] == value


def where(file: bytes, text: bytes, behind: int = 0) -> int:
    """The byte `behind` bytes after `text`, which stands in the file once or first."""
    return file.index(text) + len(text) + behind


def with_number(layout: str, number: int, at: Callable[[bytes], int]) -> Callable[[bytes], bytes]:
    def changed(file: bytes) -> bytes:
        data = bytearray(file)
        struct.pack_into(layout, data, at(file), number)
        return bytes(data)

    return changed


HUGE = 1 << 60
DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "no bytes": (lambda file: b"", "the mark of a GGUF file ends at byte 4, the file at 0"),
    "a mark": (lambda file: file[:4], "the version ends at byte 8, the file at 4"),
    "half a head": (lambda file: file[:200], "the file at 200. The file is damaged or only part"),
    "no weights": (lambda file: file[:-300], "tensor 'one' ends at byte 504, the file at 500"),
    "a byte less": (lambda file: file[:-1].rstrip(b"\0")[:-1], "ends at byte"),
    "a picture": (lambda file: b"\x89PNG" + file[4:], "expected b'GGUF'. Give a .gguf file"),
    "the first version": (with_number("<I", 1, lambda _: 4), "is of version 1 of GGUF, expected"),
    "a later version": (with_number("<I", 9, lambda _: 4), "is of version 9 of GGUF, expected"),
    "the other order": (with_number(">I", 3, lambda _: 4), "is written for big-endian machines"),
    "tensors": (with_number("<Q", HUGE, lambda _: 8), "says it has 1152921504606846976 tensors"),
    "entries": (with_number("<Q", HUGE, lambda _: 16), "entries of metadata, expected at most"),
    "a key": (with_number("<Q", HUGE, lambda _: 24), "a key has 1152921504606846976 bytes"),
    "a type": (
        with_number("<I", 77, lambda file: where(file, b"a.truth")),
        "'a.truth' is of type 77, expected one of 0 to 12",
    ),
    "a truth": (
        with_number("<B", 2, lambda file: where(file, b"a.truth", 4)),
        "the value of 'a.truth' is a truth value of 2, expected 0 or 1",
    ),
    "a text": (
        with_number("<Q", HUGE, lambda file: where(file, b"general.name", 4)),
        "the value of 'general.name' has 1152921504606846976 bytes",
    ),
    "bytes of a text": (
        with_number("<B", 0xFF, lambda file: where(file, b"general.name", 13)),
        "the value of 'general.name' is not UTF-8",
    ),
    "texts": (
        with_number("<Q", HUGE, lambda file: where(file, b"some.texts", 8)),
        "elements of 'some.texts', expected at most",
    ),
    "floats": (
        with_number("<Q", 1 << 20, lambda file: where(file, b"some.floats", 8)),
        "the value of 'some.floats' ends at byte",
    ),
    "arrays of arrays": (
        with_number("<I", 9, lambda file: where(file, b"some.texts", 4)),
        "'some.texts' is an array of arrays",
    ),
    "axes": (
        with_number("<I", 5, lambda file: where(file, b"\x03\0\0\0\0\0\0\0two")),
        "tensor 'two' has 5 axes, expected 1 to 4",
    ),
    "an empty axis": (
        with_number("<Q", 0, lambda file: where(file, b"\x03\0\0\0\0\0\0\0two", 4)),
        "tensor 'two' has the shape [3, 0], expected rows of whole blocks: 32",
    ),
    "half a block": (
        with_number("<Q", 48, lambda file: where(file, b"\x03\0\0\0\0\0\0\0two", 4)),
        "tensor 'two' has the shape [3, 48], expected rows of whole blocks: 32",
    ),
    "a type of blocks": (
        with_number("<I", 250, lambda file: where(file, b"\x03\0\0\0\0\0\0\0two", 20)),
        "tensor 'two' is of type 250, which the gguf library here does not know",
    ),
    "an offset between": (
        with_number("<Q", 33, lambda file: where(file, b"\x03\0\0\0\0\0\0\0two", 24)),
        "tensor 'two' begins at byte 33 of the weights, expected a multiple of 32",
    ),
    "an offset within another": (
        with_number("<Q", 0, lambda file: where(file, b"\x03\0\0\0\0\0\0\0two", 24)),
        "begins at byte 0 of the weights, expected a multiple of 32 from",
    ),
    "an offset far away": (
        with_number("<Q", HUGE, lambda file: where(file, b"\x03\0\0\0\0\0\0\0two", 24)),
        "tensor 'two' ends at byte 1152921504606847",
    ),
    "a name twice": (
        lambda file: file.replace(b"\x03\0\0\0\0\0\0\0two", b"\x03\0\0\0\0\0\0\0one"),
        "tensor 'one' stands twice",
    ),
    "a key twice": (
        lambda file: file.replace(b"a.number", b"some.key").replace(b"a.float", b"a.truth"),
        "the key 'a.truth' stands twice",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_with_where_and_what(file: bytes, damage: str) -> None:
    change, message = DAMAGE[damage]
    with pytest.raises(ExportError, match=r"^m\.gguf: ") as caught:
        head(change(file))
    assert message in str(caught.value)


def test_an_alignment_that_is_none_is_refused(tmp_path: Path) -> None:
    for number in (0, 24, 1 << 30):
        data = write_gguf(
            tmp_path / "m.gguf", "llama", {"general.alignment": number}, {}
        ).read_bytes()
        with pytest.raises(ExportError, match=rf"alignment is {number}, expected a power of two"):
            head(data)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> bytearray:
    """A whole model of one layer with a tokenizer."""
    network = random_model("llama", num_hidden_layers=1, vocab_size=8, tie_word_embeddings=True)
    metadata = metadata_of("llama", **{"llama.block_count": 1}) | {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "\u2581", "a", "b", "ab", "\u2581ab"],
        "tokenizer.ggml.scores": np.arange(0, -8, -1, np.float32),
        "tokenizer.ggml.token_type": np.array([2, 3, 3, 1, 1, 1, 1, 1], np.int32),
    }
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    tensors = stored_tensors("llama", network)
    write_gguf(path, "llama", metadata, tensors, GGMLQuantizationType.Q4_0)
    return bytearray(path.read_bytes())


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_whatever_bytes_change_a_model_is_read_or_refused(
    model: bytearray, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    changed, end = bytearray(model), model.index(b"blk.0.ffn_down") + 400
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, min(end, len(changed) - 1)))
        changed[at] = data.draw(st.sampled_from([0, 1, 2, 8, 9, 127, 128, 255]))
    path = tmp_path_factory.getbasetemp() / "changed.gguf"
    path.write_bytes(changed)
    try:
        file = GGUFFile.open(path)
        assert file.config["hidden_size"] == 64
        file.text_files()
        for name in file.names:
            file.read(name)
            file.grid(name)
    except ExportError as error:
        assert str(path) in str(error)


def test_a_path_that_cannot_be_opened_is_told(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"none\.gguf: cannot be read \(No such file"):
        GGUFFile.open(tmp_path / "none.gguf")
    with pytest.raises(ExportError, match=r"cannot be read \(Is a directory\)"):
        GGUFFile.open(tmp_path)
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(ExportError, match=r"empty\.gguf: is empty, expected a GGUF file"):
        GGUFFile.open(tmp_path / "empty.gguf")


def test_the_file_is_mapped(model: bytearray, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(model)
    file = GGUFFile.open(tmp_path / "m.gguf")
    assert isinstance(file._data.obj, mmap.mmap)
