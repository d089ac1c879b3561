from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_memllm.artifact.manifest import FileSpec, GraphSpec, Manifest, TableSpec, sealed
from edge_memllm.codecs import codec_ids
from edge_memllm.errors import ArtifactError, CorruptionError
from support import ROOT
from support.small_model import IDENTITY, as_version_2, file_spec, model_spec, write_artifact

CANONICAL = """\
{
  "files": {
    "graph.onnx": {
      "bytes": 5,
      "sha256": "eef93e1d14482804277fca0172464032d1a4fdbcc338524059fa1e861454ad4d"
    },
    "table.safetensors": {
      "bytes": 5656,
      "sha256": "0000000000000000000000000000000000000000000000000000000000000000"
    }
  },
  "format": "edge-memllm",
  "format_version": 3,
  "graph": {
    "compute_dtype": "float16",
    "external_data": null,
    "file": "graph.onnx",
    "kv_dtype": "float16",
    "opset": 23,
    "weights": "int4",
    "wire": "q8"
  },
  "model": {
    "architecture": "memoryllm",
    "bos_token_id": 1,
    "caches": [
      {
        "head_dim": 16,
        "kv_heads": 2,
        "layer": 0,
        "readers": [],
        "rolling": false,
        "window": null
      },
      {
        "head_dim": 16,
        "kv_heads": 2,
        "layer": 1,
        "readers": [],
        "rolling": false,
        "window": null
      }
    ],
    "details": {
      "beta": 3
    },
    "eos_token_ids": [
      2
    ],
    "hidden_size": 64,
    "identity": "IDENTITY",
    "max_position_embeddings": 128,
    "memory": {
      "gain": [
        1.0,
        0.5
      ],
      "kind": "added",
      "layers": 2,
      "width": 64
    },
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 3
  },
  "producer": "edge-memllm 0.1.0",
  "sha256": "DIGEST",
  "table": {
    "alignment": 512,
    "checksums_sha256": "1111111111111111111111111111111111111111111111111111111111111111",
    "classes": null,
    "codec": "int8-g32",
    "embedding_codec": "f16",
    "embedding_dtype": "float16",
    "file": "table.safetensors",
    "parameters_sha256": null,
    "record_bytes": 264,
    "records_offset": 4096,
    "stride": 512
  }
}
""".replace("IDENTITY", IDENTITY)
UNSEALED = CANONICAL.replace("DIGEST", "0" * 64)
CANONICAL = CANONICAL.replace("DIGEST", hashlib.sha256(UNSEALED.encode()).hexdigest())


def manifest() -> Manifest:
    model = model_spec(IDENTITY, beta=3, layers=2, width=64, vocab_size=3)
    return Manifest(
        model=dataclasses.replace(
            model,
            eos_token_ids=(2,),
            memory=dataclasses.replace(model.memory, gain=(1.0, 0.5)),
        ),
        table=TableSpec(
            file="table.safetensors",
            codec="int8-g32",
            embedding_dtype="float16",
            embedding_codec="f16",
            record_bytes=2 * 64 + 2 * 4 + 128,
            stride=512,
            alignment=512,
            records_offset=4096,
            checksums_sha256="1" * 64,
            parameters_sha256=None,
            classes=None,
        ),
        graph=GraphSpec("graph.onnx", None, "int4", "float16", "float16", "q8", 23),
        files={
            "table.safetensors": FileSpec(4096 + 3 * (512 + 8), "0" * 64),
            "graph.onnx": file_spec(b"graph"),
        },
        producer="edge-memllm 0.1.0",
    )


def refused(change: Callable[[dict[str, Any]], object]) -> str:
    """Return the message for the canonical manifest after `change`."""
    content = json.loads(CANONICAL)
    change(content)
    with pytest.raises(ArtifactError) as caught:
        Manifest.from_json(sealed(content), "out/manifest.json")
    assert str(caught.value).startswith("out/manifest.json: ")
    return str(caught.value).removeprefix("out/manifest.json: ")


def put(*path_and_value: Any) -> Callable[[dict[str, Any]], None]:
    *path, key, value = path_and_value

    def change(content: dict[str, Any]) -> None:
        for step in path:
            content = content[step]
        content[key] = value

    return change


def read_twice(window: int | None = None, **first: Any) -> Callable[[dict[str, Any]], None]:
    """Three layers, of which the last reads the keys and values of the first."""

    def change(content: dict[str, Any]) -> None:
        content["model"] |= {"num_hidden_layers": 3}
        content["model"]["memory"] |= {"layers": 1, "gain": [1.0] * 3}
        content["model"]["caches"][0] |= {"window": window, "readers": [2], **first}

    return change


def rolling_window(window: int) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        content["model"]["caches"][0] |= {"rolling": True, "window": window}

    return change


def test_canonical_json_is_stable() -> None:
    assert manifest().to_json().decode() == CANONICAL


def test_specification_names_every_key_and_codec() -> None:
    text = (ROOT / "docs" / "format.md").read_text()
    keys = [key for part, key in LEAVES if part != "files"]
    names = [*keys, *codec_ids(), "format", "format_version", "producer", "files"]
    assert [name for name in names if f"{name}`" not in text] == []


def test_round_trip() -> None:
    assert Manifest.from_json(CANONICAL.encode(), "here") == manifest()


@pytest.mark.parametrize("codec", ["f32", "f16", "int8-g64", "int4-g32", "none"])
def test_layout_follows_from_the_manifest(tmp_path: Path, codec: str) -> None:
    small = write_artifact(tmp_path / "artifact", codec=codec)
    layout = small.manifest.layout
    assert layout.layers == (0 if codec == "none" else 2)
    assert layout.codec.id == codec
    assert layout.stride == small.manifest.table.stride


def test_writing_is_as_strict_as_reading() -> None:
    broken = dataclasses.replace(manifest(), producer="two\nlines")
    with pytest.raises(ArtifactError, match=r"manifest\.json: producer is .*two.*expected a line"):
        broken.to_json()
    model = manifest().model
    memory = dataclasses.replace(model.memory, gain=(1.0, float("nan")))
    model = dataclasses.replace(model, memory=memory)
    with pytest.raises(ArtifactError, match="NaN is not a JSON number"):
        dataclasses.replace(manifest(), model=model).to_json()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("format", "gguf"), "this is not an edge-memllm manifest"),
        (lambda content: content.clear(), "this is not an edge-memllm manifest"),
        (
            lambda content: content.pop("format_version"),
            "format_version is null, expected",
        ),
        (put("format_version", 0), "format_version is 0, expected an integer from 1"),
        (put("format_version", True), "format_version is true, expected an integer"),
        (
            put("format_version", 7),
            "format_version is 7, this reader supports 1 to 3. Upgrade edge-memllm or export",
        ),
        (put("created", "today"), "unknown key 'created'"),
        (lambda content: content.pop("graph"), "key 'graph' is missing"),
        (put("producer", "ä"), "producer is '\\xe4', expected a line of ASCII text"),
        (put("model", 3), "model: found 3, expected an object"),
        (put("model", "rope", 1), "model: unknown key 'rope'"),
        (put("model", "identity", "sha256:" + "A" * 64), "model: identity is"),
        (put("model", "beta", 3), "model: unknown key 'beta'"),
        (put("model", "architecture", "Llama 3"), "model: architecture is 'Llama 3', expected a"),
        (put("model", "hidden_size", 0), "model: hidden_size is 0, expected"),
        (put("model", "hidden_size", 64.0), "model: hidden_size is 64.0, expected an integer"),
        (put("model", "vocab_size", 1 << 40), "model: vocab_size is 1099511627776, expected"),
        (put("model", "bos_token_id", 3), "model: bos_token_id is 3, expected an integer from 0"),
        (put("model", "eos_token_ids", [-1]), "model: eos_token_ids is -1, expected"),
        (put("model", "eos_token_ids", None), "model: eos_token_ids is null, expected a list"),
        (put("model", "memory", 2), "model: memory: found 2, expected an object"),
        (put("model", "memory", "gain", [1.0]), "memory: gain has 1 values, expected one for each"),
        (put("model", "memory", "gain", [1, "1"]), "memory: gain is '1', expected a number"),
        (put("model", "memory", "layers", 0), "memory: layers is 0, expected 2 or 1 for kind 'add"),
        (put("model", "memory", "layers", 3), "memory: layers is 3, expected 2 or 1 for kind 'add"),
        (put("model", "memory", "kind", "none"), "memory: layers is 2, expected 0 for kind 'none'"),
        (put("model", "memory", "kind", "mixed"), "memory: kind is 'mixed', expected one of none"),
        (put("model", "memory", "width", 32), "memory: width is 32, expected 64 for kind 'added'"),
        (put("model", "caches", 0, "kv_heads", 3), "num_attention_heads is 4, expected a multiple"),
        (put("model", "caches", 1, "window", 0), "caches: 1: window is 0, expected an integer"),
        (
            put("model", "caches", 0, "rolling", True),
            "layer 0 is rolling, which needs a window below",
        ),
        (rolling_window(128), "a window below the 128 of max_position_embeddings, and has 128"),
        (
            put("model", "caches", 1, "rolling", 1),
            "caches: 1: rolling is 1, expected true or false",
        ),
        (
            put("model", "caches", 0, "readers", [1]),
            "layer 1 reads those of layer 0, expected a later",
        ),
        (
            put("model", "caches", 0, "readers", [2]),
            "layer 2 reads those of layer 0, expected a later",
        ),
        (
            put("model", "caches", 1, "readers", [0]),
            "layer 0 reads those of layer 1, expected a later",
        ),
        (put("model", "caches", 0, "readers", ["1"]), "caches: 0: readers"),
        (read_twice(rolling=True, window=12), "layer 0 is rolling, and layer 2 reads it as well"),
        (put("model", "caches", 0, "rolling", None), "caches: 0: rolling is None, expected true"),
        (put("model", "caches", 0, "head_dim", None), "caches: 0: head_dim is null, expected an"),
        (put("model", "caches", []), "caches are of the layers [], expected some of 2, each once"),
        (put("model", "caches", 1, "layer", 0), "caches are of the layers [0, 0], expected some"),
        (put("model", "caches", 1, "layer", 2), "caches are of the layers [0, 2], expected some"),
        (put("model", "details", []), "model: details is a list of 0, expected an object"),
        (put("model", "details", "Beta", 3), "details: found the name 'Beta', expected a word of"),
        (put("model", "details", "beta", [3]), "details: beta is [3], expected a number, true"),
        (put("model", "details", "beta", "\n"), "details: beta is '\\n', expected a number, true"),
        (put("model", "details", dict.fromkeys(map(str, range(33)))), "found 33, expected at most"),
        (put("table", "codec", "int2"), "table: Unknown codec 'int2', this version knows f32, f16"),
        (put("table", "codec", "none"), "table: codec none: stores no memory rows"),
        (put("table", "codec", "int8-g128"), "width 64 is not a multiple of the group size 128"),
        (put("table", "codec", "int8-g64"), "table: record_bytes is 264, expected 260"),
        (put("table", "embedding_dtype", "bfloat16"), "table: embedding_dtype is 'bfloat16'"),
        (put("table", "embedding_codec", None), "table: embedding_codec is null, expected a codec"),
        (put("table", "embedding_codec", "int7"), "table: embedding: Unknown codec 'int7', this"),
        (put("table", "embedding_codec", "mixed-g32"), "embedding: Unknown codec 'mixed-g32'"),
        (put("table", "embedding_codec", "none"), "embedding codec none: expected one that stores"),
        (put("table", "embedding_codec", "nested8-g32"), "embedding codec nested8-g32: expected"),
        (put("table", "embedding_codec", "codebook4-g32"), "codec codebook4-g32: expected one"),
        (put("table", "embedding_codec", "lowrank-r32-f16"), "codec lowrank-r32-f16: expected one"),
        (put("table", "embedding_codec", "int8-g128"), "width 64 is not a multiple of the group"),
        (put("table", "embedding_codec", "int8-g32"), "record_bytes is 264, expected 204"),
        (put("table", "stride", 1024), "table: stride is 1024, expected 512"),
        (put("table", "alignment", 768), "table: alignment 768, expected a power of two from 64"),
        (put("table", "records_offset", 512), "records_offset is 512, expected a multiple of 4096"),
        (put("table", "checksums_sha256", "1" * 63), "table: checksums_sha256 is '111"),
        (put("table", "codec", "INT8"), "table: codec is 'INT8', expected a codec id"),
        (put("table", "parameters_sha256", "1"), "parameters_sha256 is '1', expected 64 hex"),
        (
            put("table", "parameters_sha256", "1" * 64),
            r"codec int8-g32 has 0 bytes of parameters",
        ),
        (
            put("table", "codec", "codebook4-g32"),
            r"parameters_sha256 is None, codec codebook4-g32 has 32 bytes of parameters",
        ),
        (put("table", "file", "graph.onnx"), "table: the size of graph.onnx is 5, expected 5656"),
        (put("table", "file", "rows.bin"), "table: 'rows.bin' is not listed under files"),
        (put("graph", "file", "other.onnx"), "graph: 'other.onnx' is not listed under files"),
        (put("graph", "file", "table.safetensors"), "graph: table, graph and external data must"),
        (put("graph", "external_data", "graph.onnx"), "graph: table, graph and external data must"),
        (put("graph", "external_data", "w.data"), "graph: 'w.data' is not listed under files"),
        (put("graph", "external_data", 0), "graph: external_data is 0, expected a plain file name"),
        (put("graph", "weights", "int3"), "graph: weights is 'int3', expected one of int2, int4"),
        (put("graph", "compute_dtype", "half"), "graph: compute_dtype is 'half', expected one of"),
        (put("graph", "kv_dtype", "int4"), "graph: kv_dtype is 'int4', expected one of float16"),
        (
            lambda content: content["graph"].update(compute_dtype="float32", kv_dtype="float16"),
            "kv_dtype is 'float16', expected float32 or int8",
        ),
        (put("graph", "wire", "q5"), "graph: wire is 'q5', expected one of none, f32"),
        (put("graph", "wire", "q4"), "graph: wire is 'q4', expected 'q8' for codec int8-g32"),
        (put("graph", "opset", 0), "graph: opset is 0, expected"),
        (put("files", []), "files is a list of 0, expected an object"),
        (put("files", "a", 1), "files: a: found 1, expected an object"),
        (put("files", "table.safetensors", "bytes", 5657), "is 5657, expected 5656"),
        (put("files", "table.safetensors", "bytes", -1), "bytes is -1, expected an integer"),
        (put("files", "table.safetensors", "sha256", "x"), "sha256 is 'x', expected 64 hex digits"),
        (
            put("files", "Graph.ONNX", {"bytes": 5, "sha256": "0" * 64}),
            "files: 'graph.onnx' is there already, case does not",
        ),
        (put("files", "manifest.json", {}), "files: 'manifest.json' is there already"),
        (
            put("files", "tokenizer.json", {"bytes": 1 << 40, "sha256": "0" * 64}),
            "graph: the files besides table and graph have 1099511627776 bytes, expected at most",
        ),
    ],
)
def test_refuses(change: Callable[[dict[str, Any]], object], message: str) -> None:
    assert message in refused(change)


@pytest.mark.parametrize(
    "name",
    [
        "", ".", "..", "../x", "a/b", "/etc/passwd", "a\\b", "C:x", "a\0b", ".hidden", "a\n", "-x",
        "a ", "trailing.", "ä", "x" * 201, "~", "file:///x",
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", ["files", "table", "graph"])
def test_refuses_names_that_are_not_plain(place: str, name: str) -> None:
    path = ("files", name, {}) if place == "files" else (place, "file", name)
    assert "expected a plain file name" in refused(put(*path))


def test_records_must_start_on_their_own_alignment() -> None:
    def change(content: dict[str, Any]) -> None:
        content["table"] |= {"alignment": 8192, "stride": 8192}

    assert "records_offset is 4096, expected a multiple of 8192" in refused(change)


LEAVES = [
    (part, key)
    for part, content in json.loads(CANONICAL).items()
    if isinstance(content, dict)
    for key in content
]
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@given(st.sampled_from(LEAVES), JSON_VALUES)
def test_any_value_anywhere_is_accepted_whole_or_refused(
    leaf: tuple[str, str], value: object
) -> None:
    content = json.loads(CANONICAL)
    put(*leaf, value)(content)
    try:
        parsed = Manifest.from_json(sealed(content), "here")
    except ArtifactError:
        return
    assert json.loads(parsed.to_json()) == json.loads(sealed(content))


def test_a_rolling_cache_keeps_a_window() -> None:
    content = json.loads(CANONICAL)
    rolling_window(127)(content)
    first, second = Manifest.from_json(sealed(content), "here").model.caches
    assert (first.window, first.rolling, second.rolling) == (127, True, False)


def without_readers(content: dict[str, Any]) -> None:
    for cache in content["model"]["caches"]:
        del cache["readers"]


def without_codec(content: dict[str, Any]) -> None:
    del content["table"]["embedding_codec"]


def without_rolling(content: dict[str, Any]) -> None:
    for cache in content["model"]["caches"]:
        del cache["rolling"]


@pytest.mark.parametrize("leave_out", [without_codec, without_rolling, without_readers])
def test_what_the_first_manifests_of_version_3_left_unsaid(
    leave_out: Callable[[dict[str, Any]], None],
) -> None:
    content = json.loads(CANONICAL)
    del content["sha256"]
    leave_out(content)
    found = Manifest.from_json(sealed(content), "here")
    assert found == manifest()
    own = json.dumps(content, sort_keys=True, indent=2) + "\n"
    assert found.fingerprint == hashlib.sha256(own.encode()).hexdigest()
    assert found.fingerprint != manifest().fingerprint


@pytest.mark.parametrize("byte", range(8))
def test_every_flipped_bit_is_refused(byte: int) -> None:
    """In one eighth of the bytes each, so that a failure names a part."""
    for place in range(byte, len(CANONICAL), 8):
        for bit in range(8):
            data = bytearray(CANONICAL.encode())
            data[place] ^= 1 << bit
            with pytest.raises(ArtifactError):
                Manifest.from_json(bytes(data), "here")


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("  ", " "),
        lambda text: text.rstrip(),
        lambda text: text + " ",
        lambda text: text.replace('"layers": 2', '"layers": 2, "layers": 2'),
        lambda text: json.dumps(json.loads(text)),
        lambda text: text.replace("sha256:", "sha256\\u003a"),
        lambda text: text.replace('"sha256": "', '"sha256": "\\u0030', 3),
        lambda text: text.replace("1.0,", "1,"),
    ],
)
def test_another_spelling_of_the_same_is_refused(change: Callable[[str], str]) -> None:
    changed = change(CANONICAL)
    assert changed != CANONICAL
    with pytest.raises(ArtifactError):
        Manifest.from_json(changed.encode(), "here")


def test_a_change_is_told_as_such() -> None:
    changed = CANONICAL.replace("0.5", "0.7")
    with pytest.raises(CorruptionError, match=r"^here: sha256 of its content is [0-9a-f]{12}, it"):
        Manifest.from_json(changed.encode(), "here")


@pytest.mark.parametrize("digest", [None, 7, "0" * 63, "A" * 64, ["0" * 64]])
def test_a_digest_that_is_none_is_refused(digest: object) -> None:
    content = json.loads(CANONICAL) | {"sha256": digest}
    with pytest.raises(ArtifactError, match="sha256 is missing or is not 64 hex digits"):
        Manifest.from_json(json.dumps(content).encode(), "here")


def test_a_digest_in_two_places_is_refused() -> None:
    digest = json.loads(CANONICAL)["sha256"]
    with pytest.raises(CorruptionError, match="the file was changed after it was written"):
        Manifest.from_json(CANONICAL.replace("0" * 64, digest).encode(), "here")


def earlier(version: int) -> dict[str, Any]:
    """The canonical manifest as versions 1 and 2 said it."""
    return as_version_2(json.loads(CANONICAL)) | {"format_version": version}


def parsed(content: dict[str, Any]) -> Manifest:
    return Manifest.from_json(json.dumps(content).encode(), "here")


@pytest.mark.parametrize("version", [1, 2])
def test_earlier_versions_say_the_same(version: int) -> None:
    details = {"beta": 3, "feed_forward_parameters": 2 * 3 * 64 * 64}
    model = dataclasses.replace(manifest().model, details=details)
    assert parsed(earlier(version)) == dataclasses.replace(manifest(), model=model)
    with pytest.raises(ArtifactError, match="unknown key 'sha256'"):
        parsed(earlier(version) | {"sha256": "0" * 64})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("model", "beta", 9), "model: beta is 9, expected an integer from 0 to 8"),
        (put("model", "beta", 8), "memory_layers is 2, expected 0 for beta 8"),
        (put("model", "memory_layers", 0), "memory_layers is 0, expected 2 or 1 for beta 3"),
        (put("model", "memory_layers", 3), "memory_layers is 3, expected 2 or 1 for beta 3"),
        (put("model", "memory_gain", [1.0]), "memory_gain has 1 values, expected one for each"),
        (put("model", "num_key_value_heads", 3), "num_attention_heads is 4, expected a multiple"),
        (put("model", "architecture", "llama"), "unknown key 'architecture'"),
    ],
)
def test_earlier_versions_are_read_as_strictly(
    change: Callable[[dict[str, Any]], object], message: str
) -> None:
    content = earlier(2)
    change(content)
    with pytest.raises(ArtifactError, match=message):
        parsed(content)


@pytest.mark.parametrize("version", [1, 2])
def test_the_fingerprint_of_earlier_versions_is_the_digest_of_version_2(version: int) -> None:
    text = json.dumps(earlier(2), sort_keys=True, indent=2) + "\n"
    found = parsed(earlier(version)).fingerprint
    assert found == hashlib.sha256(text.encode()).hexdigest()


def test_the_fingerprint_is_the_digest_without_itself() -> None:
    content = json.loads(CANONICAL)
    del content["sha256"]
    text = json.dumps(content, sort_keys=True, indent=2) + "\n"
    assert manifest().fingerprint == hashlib.sha256(text.encode()).hexdigest()
