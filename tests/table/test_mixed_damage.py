"""Tables with classes of tokens that are damaged, and manifests that say what cannot be."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_mixed_table import EVERY, TOKENS, open_table, small

from edge_memllm.artifact.folder import Artifact
from edge_memllm.artifact.manifest import Manifest, sealed
from edge_memllm.artifact.verification import verify_artifact
from edge_memllm.errors import ArtifactError, CorruptionError
from support.ready_codecs import MIXED
from support.small_model import SmallArtifact, as_version_2, file_spec, flip, write_artifact

__all__ = ["small"]  # a fixture

# --- damage ----------------------------------------------------------------------------------


def verify(small: SmallArtifact) -> list[str]:
    stages: list[str] = []
    with Artifact.open(small.path) as artifact:
        verify_artifact(artifact, lambda stage, done, total: stages.append(stage))
    return stages


def forget_digest(small: SmallArtifact) -> None:
    """Let the manifest vouch for the table as it is, as a careless repair would."""
    files = dict(small.manifest.files)
    files[small.manifest.table.file] = file_spec(small.table.read_bytes())
    small.rewrite_manifest(files=files)


def test_verify_reads_every_class_to_its_end(
    small: SmallArtifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "edge_memllm.artifact.verification._CHUNK_BYTES", 3 * small.manifest.table.stride
    )
    stages = verify(small)
    assert stages.count("records") == -(-TOKENS // 3)
    assert stages.count("padding") == sum(
        -(-each.tokens // 3) for each in small.manifest.table.classes
    )


@pytest.mark.parametrize("token", [0, 5, 17, 39])
def test_a_changed_record_is_found(small: SmallArtifact, token: int) -> None:
    table = open_table(small)
    offset, size = table.locate(token)
    for place in (offset, offset + size - 1):
        flip(small.table, place)
        match = f"the record of token {token} at byte {offset} does not match its checksum"
        with pytest.raises(CorruptionError, match=match):
            table.rows(EVERY)
        forget_digest(small)
        with pytest.raises(CorruptionError, match=match):
            verify(small)
        flip(small.table, place)
    flip(small.table, offset + size)
    forget_digest(small)
    table.rows(EVERY)
    with pytest.raises(CorruptionError, match=f"behind the record of token {token} is not zero"):
        verify(small)
    table.close()


def parameters_at(small: SmallArtifact) -> int:
    return small.table.stat().st_size - small.manifest.layout.parameters_bytes


def test_a_changed_class_of_a_token_is_found(small: SmallArtifact) -> None:
    flip(small.table, parameters_at(small) + 11)
    with pytest.raises(CorruptionError, match="sha256 of the parameters is"):
        open_table(small)


@pytest.mark.parametrize("change", [lambda own: (own + 1) % len(MIXED), lambda _: 255])
def test_classes_must_have_the_tokens_the_manifest_says(
    small: SmallArtifact, change: Callable[[int], int]
) -> None:
    """Even when all digests were made to fit."""
    content = bytearray(small.table.read_bytes())
    place = parameters_at(small) + 11
    content[place] = change(content[place])
    small.table.write_bytes(content)
    digest = hashlib.sha256(content[parameters_at(small) :]).hexdigest()
    table = dataclasses.replace(small.manifest.table, parameters_sha256=digest)
    files = small.manifest.files | {table.file: file_spec(bytes(content))}
    small.rewrite_manifest(table=table, files=files)
    with pytest.raises(ArtifactError, match=r"mixed-g32: classes of .* tokens, expected .* Export"):
        open_table(small)


def test_two_tokens_that_changed_classes_are_found(small: SmallArtifact) -> None:
    """The counts fit, but their records lie elsewhere."""
    content = bytearray(small.table.read_bytes())
    place = parameters_at(small)
    one, other = 0, next(t for t in range(TOKENS) if content[place + t] != content[place])
    content[place + one], content[place + other] = content[place + other], content[place + one]
    small.table.write_bytes(content)
    digest = hashlib.sha256(content[place:]).hexdigest()
    table = dataclasses.replace(small.manifest.table, parameters_sha256=digest)
    small.rewrite_manifest(table=table)
    opened = open_table(small)
    for token in (one, other):
        with pytest.raises(CorruptionError, match=f"the record of token {token} at byte"):
            opened.rows(np.array([token]))
    opened.close()


def test_the_header_must_say_what_the_manifest_says(small: SmallArtifact) -> None:
    content = small.table.read_bytes()
    start = small.manifest.table.records_offset
    header = json.loads(content[8:start])
    for change, message in (
        (lambda h: h["__metadata__"].pop("classes"), "__metadata__: key 'classes' is missing"),
        (lambda h: h["__metadata__"].update(classes="[]"), 'classes is "[]", the manifest says'),
        (lambda h: h["records.1"].update(shape=[1, 512]), "tensor 'records.1' is"),
        (lambda h: h.pop("records.5"), "key 'records.5' is missing"),
        (lambda h: h.update(records={}), "unknown key 'records'"),
    ):
        changed = json.loads(json.dumps(header))
        change(changed)
        text = json.dumps(changed, separators=(",", ":")).encode().ljust(start - 8)
        small.table.write_bytes(struct.pack("<Q", start - 8) + text + content[start:])
        with pytest.raises(ArtifactError, match=message.replace("[", r"\[")) as caught:
            open_table(small)
        assert len(str(caught.value)) < 700


# --- manifest --------------------------------------------------------------------------------


def change_of(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["table"].update(changes)


def change_class(number: int, **changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["table"]["classes"][number].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["table"].pop("classes"), "table: key 'classes' is missing"),
        (change_of(classes=None), "codec mixed-g32: without classes of tokens"),
        (change_of(classes=[]), "0 classes of tokens, expected 1 to 16"),
        (change_of(classes=7), "table: classes is 7, expected a list"),
        (change_of(classes=[{}] * 17), "classes is a list of 17, expected a list of at m"),
        (change_of(classes=[{}]), "table: classes: key 'layers' is missing"),
        (change_of(classes=[1]), "table: classes: found 1, expected an object"),
        (change_class(1, name="rare"), "table: classes: unknown key 'name'"),
        (change_class(1, tokens=True), "table: classes: tokens is true, expected an integer"),
        (change_class(1, tokens=0), "table: classes: tokens is 0, expected an integer from 1"),
        (change_class(1, tokens=999), "table: the number of tokens is"),
        (change_class(1, layers="int8-g32"), "table: classes: layers is 'int8-g32', expected a l"),
        (change_class(1, layers=[3, "int8-g32"]), "layers is 3, expected a codec id"),
        (change_class(1, layers=["int8-g32"]), "class 1 has codecs for 1 layers, class 0 for 2"),
        (change_class(1, layers=["f16", "f16"]), "class 1: codec 'f16' cannot be mixed"),
        (change_class(1, layers=["int8-g32", "int8-g32"]), "is "),
        (change_of(codec="mixed-g64"), "codec mixed-g64: the smallest group of its classes is 32"),
        (change_of(codec="int8-g32"), "codec int8-g32: has no classes of tokens, found 6"),
        (change_of(record_bytes=9), "table: record_bytes is 9, expected"),
        (change_of(stride=8192), "table: stride is 8192, expected"),
        (change_of(parameters_sha256=None), "parameters_sha256 is None, codec mixed-g32 has"),
        (
            lambda content: content["model"].update(
                num_hidden_layers=3,
                memory={**content["model"]["memory"], "gain": [1.0, 1.0, 1.0], "layers": 3},
            ),
            "codec mixed-g32, class 0: there are 3 layers, it has codecs for 2",
        ),
    ],
)
def test_manifests_that_cannot_be(
    small: SmallArtifact, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    content = json.loads((small.path / "manifest.json").read_bytes())
    change(content)
    with pytest.raises(ArtifactError) as caught:
        Manifest.from_json(sealed(content), "here")
    assert message in str(caught.value)


def test_version_1_has_no_classes(tmp_path: Path) -> None:
    small = write_artifact(tmp_path / "artifact")
    content = json.loads((small.path / "manifest.json").read_bytes())
    content = as_version_2(content) | {"format_version": 1}
    for part, key in (("table", "classes"), ("table", "parameters_sha256"), ("graph", "kv_dtype")):
        del content[part][key]
    assert Manifest.from_json(json.dumps(content).encode(), "here").table.classes is None


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_change_of_the_classes_is_accepted_whole_or_refused(
    small: SmallArtifact, data: st.DataObject
) -> None:
    content = json.loads((small.path / "manifest.json").read_bytes())
    classes = content["table"]["classes"]
    each = data.draw(st.sampled_from(classes))
    key = data.draw(st.sampled_from(["tokens", "layers", "x"]))
    values = st.none() | st.booleans() | st.integers() | st.text(max_size=9)
    parts = st.sampled_from(["int8-g32", "codebook2-g128", "int4-g64", "f32", "mixed-g32"])
    each[key] = data.draw(values | st.lists(parts | values, max_size=3))
    try:
        parsed = Manifest.from_json(sealed(content), "here")
    except ArtifactError:
        return
    assert json.loads(parsed.to_json()) == json.loads(sealed(content))
