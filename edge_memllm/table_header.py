"""The header of the table file: a safetensors header that the manifest determines completely.

Writing builds it, opening compares it. It is JSON padded with spaces so that records start on a
page. Nothing in it is believed that the manifest does not say as well.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import numpy as np

from edge_memllm.errors import ArtifactError, CorruptionError
from edge_memllm.records import RecordLayout
from edge_memllm.strict_json import MAX_JSON_BYTES, exact_fields, parse_json_object
from edge_memllm.tensor_header import (
    LENGTH,
    PAGE,
    Tensors,
    compact,
    header_bytes,
    header_content,
)

FORMAT = "edge-memllm-table"
FORMAT_VERSION = "1"

_BYTE, _CHECKSUM = np.dtype("u1"), np.dtype("<u8")


def build_header(layout: RecordLayout, vocab_size: int, identity: str) -> bytes:
    """Return the bytes in front of the first record: length, JSON and padding."""
    metadata, tensors = _metadata(layout, identity), _tensors(layout, vocab_size)
    return header_bytes(metadata, tensors, max(PAGE, layout.alignment))


def header_length(first: bytes, records_offset: int, where: str) -> int:
    """Return the length of the JSON, from the first 8 bytes of the file.

    Raises `CorruptionError` unless the records start right behind it, where the manifest says.
    """
    length: int = LENGTH.unpack(first)[0]
    if LENGTH.size + length != records_offset or length > MAX_JSON_BYTES:
        raise CorruptionError(
            f"{where}: the header is {length} bytes, expected {records_offset - LENGTH.size} "
            f"and at most {MAX_JSON_BYTES}. Copy the folder again."
        )
    return length


def check_header(
    data: bytes, layout: RecordLayout, vocab_size: int, identity: str, where: str
) -> None:
    """Compare the JSON of a header with what it must say for this model.

    Raises `ArtifactError` naming the first difference: another model, codec, version, or tensors
    of other names, types, shapes or places.
    """
    expected = header_content(_metadata(layout, identity), _tensors(layout, vocab_size))
    if not data.startswith(b"{"):
        raise ArtifactError(f"{where}: the header does not start with '{{'. Copy the folder again.")
    header = parse_json_object(data, where)
    found = exact_fields(header, where, expected).mapping("__metadata__")
    exact_fields(found, f"{where}: __metadata__", expected["__metadata__"])
    if found["identity"] != identity:
        raise ArtifactError(
            f"{where}: this is the table of model {_shortened(found['identity'])}, the manifest is "
            f"for model {_shortened(identity)}. The files are from different exports; copy the "
            "folder again."
        )
    for key, value in expected["__metadata__"].items():
        _compare(found[key], value, key, where)
    for name, tensor in expected.items():
        if name != "__metadata__":
            _compare(header[name], tensor, f"tensor '{name}'", where)


def _tensors(layout: RecordLayout, vocab_size: int) -> Tensors:
    """Return what stands behind the header, in the order of the file."""
    tensors: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
    counts = layout.counts(vocab_size)
    for number, (variant, count) in enumerate(zip(layout.variants, counts, strict=True)):
        name = "records" if layout.codec.classes is None else f"records.{number}"
        tensors[name] = (_BYTE, (count, variant.stride))
    columns = layout.checksums
    tensors["checksums"] = (_CHECKSUM, (vocab_size,) if columns == 1 else (vocab_size, columns))
    if size := layout.parameters_bytes:
        tensors["parameters"] = (_BYTE, (size,))
    return tensors


def _metadata(layout: RecordLayout, identity: str) -> dict[str, str]:
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "identity": identity,
        "codec": layout.codec.id,
        "embedding_dtype": layout.embedding_dtype,
        "layers": str(layout.layers),
        "width": str(layout.width),
        "alignment": str(layout.alignment),
    }
    classes = layout.codec.classes
    if classes is not None:  # as text, since metadata of safetensors is nothing else
        metadata["classes"] = compact([asdict(each) for each in classes])
    return metadata


def _shortened(identity: object) -> str:
    return ascii(identity).strip("'")[: len("sha256:") + 12]


def _compare(found: object, expected: object, what: str, where: str) -> None:
    # Compared as text: in Python True equals 1 and 1.0 equals 1, in the file they must not.
    shown, wanted = json.dumps(found, sort_keys=True), json.dumps(expected, sort_keys=True)
    if shown != wanted:
        raise ArtifactError(
            f"{where}: {what} is {shown:.200}, the manifest says {wanted:.200}. "
            "The table is from another export; copy the folder again."
        )
