"""The header of an overlay file: safetensors JSON that the spec and three numbers determine.

Writing builds it, reading builds it again and compares: nothing else is accepted.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_memllm.errors import ArtifactError, RequestError
from edge_memllm.overlays.overlay import OverlaySpec
from edge_memllm.strict_json import Fields, parse_json_object
from edge_memllm.table_header import LENGTH, PAGE

if TYPE_CHECKING:
    from hashlib import _Hash

FORMAT = "edge-memllm-overlay"
FORMAT_VERSION = "1"
SUFFIX = ".overlay.safetensors"
MOST_ENTRIES = (1 << 32) - 1
# Behind the rows, in this order: the widest first, so that each column is aligned.
COLUMNS: dict[str, tuple[str, np.dtype[Any]]] = {
    "tokens": ("U32", np.dtype("<u4")),
    "places": ("U32", np.dtype("<u4")),
    "factors": ("F32", np.dtype("<f4")),
    "layers": ("U16", np.dtype("<u2")),
    "operations": ("U8", np.dtype("u1")),
}
_KEYS = ("format", "format_version", "name", "description", "identity", "layers", "width")
_METADATA = (*_KEYS, "codec", "entries", "rows", "sha256")
_UNSEALED = "0" * 64
_NUMBER = re.compile(r"0|[1-9][0-9]{0,9}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_ANY = re.compile(r"(?s).*")


@dataclass(frozen=True, slots=True)
class Header:
    """What a header says."""

    spec: OverlaySpec
    entries: int
    rows: int
    sha256: str = _UNSEALED  # of what stands behind the header, then the header with these zeros

    @property
    def size(self) -> int:
        """Bytes in front of the rows: told by the spec alone, so that it can be written last."""
        widest = Header(self.spec, MOST_ENTRIES, MOST_ENTRIES)
        return -(-(LENGTH.size + len(widest._json())) // PAGE) * PAGE

    @property
    def data_bytes(self) -> int:
        """Bytes behind the header."""
        return self.rows * self.spec.row_bytes + self.entries * _entry_bytes()

    def to_bytes(self) -> bytes:
        """Return length, JSON, and spaces up to the size."""
        room = self.size - LENGTH.size
        return LENGTH.pack(room) + self._json().ljust(room)

    def sealed(self, digest: _Hash) -> Header:
        """Return this header with its digest; `digest` has seen everything behind the header."""
        complete = digest.copy()
        complete.update(replace(self, sha256=_UNSEALED).to_bytes())
        return replace(self, sha256=complete.hexdigest())

    @classmethod
    def from_json(cls, data: bytes, where: str) -> Header:
        """Parse what stands behind the length.

        Raises `ArtifactError` for anything that `to_bytes` would not have written.
        """
        if not data.startswith(b"{"):
            raise ArtifactError(f"{where}: this is not an overlay: no JSON at its beginning.")
        content = parse_json_object(data, where)
        metadata = content.get("__metadata__")
        if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
            raise ArtifactError(
                f"{where}: this is not an overlay (no format '{FORMAT}'). Make one with "
                "'edge-memllm overlay'."
            )
        if metadata.get("format_version") != FORMAT_VERSION:
            found = f"{metadata.get('format_version')!a:.20}"
            raise ArtifactError(
                f"{where}: overlay format version {found}, this version reads "
                f"'{FORMAT_VERSION}'. Upgrade edge-memllm or make the overlay again."
            )
        header = _from_metadata(metadata, where)
        if header.to_bytes()[LENGTH.size :] != data:
            raise ArtifactError(
                f"{where}: the header is not the one that its metadata make: other tensors, "
                "places or spelling. Copy the file again, or make the overlay again."
            )
        return header

    def _json(self) -> bytes:
        content: dict[str, object] = {"__metadata__": self._metadata()}
        start = self.rows * self.spec.row_bytes
        content["rows"] = _tensor("U8", [self.rows, self.spec.row_bytes], 0, start)
        for name, (dtype, kind) in COLUMNS.items():
            end = start + self.entries * kind.itemsize
            content[name] = _tensor(dtype, [self.entries], start, end)
            start = end
        return json.dumps(content, sort_keys=True, separators=(",", ":")).encode("ascii")

    def _metadata(self) -> dict[str, str]:
        spec = self.spec
        values = (FORMAT, FORMAT_VERSION, spec.name, spec.description, spec.identity)
        numbers = (str(spec.layers), str(spec.width))
        counts = (str(self.entries), str(self.rows))
        return dict(
            zip(_METADATA, (*values, *numbers, spec.codec, *counts, self.sha256), strict=True)
        )


def _from_metadata(metadata: dict[str, object], where: str) -> Header:
    fields = Fields(metadata, f"{where}: __metadata__", _METADATA)

    def number(key: str) -> int:
        return int(fields.text(key, _NUMBER, "a whole number as text"))

    try:
        spec = OverlaySpec(
            name=fields.text("name", _ANY, "text"),
            identity=fields.text("identity", _ANY, "text"),
            layers=number("layers"),
            width=number("width"),
            codec=fields.text("codec", _ANY, "text"),
            description=fields.text("description", _ANY, "text"),
        )
    except RequestError as error:
        raise ArtifactError(f"{where}: {error}") from error
    entries, rows = number("entries"), number("rows")
    if not rows <= entries <= MOST_ENTRIES:
        raise ArtifactError(
            f"{where}: {rows} rows and {entries} entries, expected at most one row for each entry "
            f"and at most {MOST_ENTRIES} entries."
        )
    return Header(spec, entries, rows, fields.text("sha256", _DIGEST, "64 hex digits"))


def _entry_bytes() -> int:
    return sum(kind.itemsize for _, kind in COLUMNS.values())


def _tensor(dtype: str, shape: list[int], start: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
