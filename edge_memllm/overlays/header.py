"""The header of an overlay file: safetensors JSON that the spec and three numbers determine.

Writing builds it, reading builds it again and compares: nothing else is accepted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_memllm.checked_values import Fields
from edge_memllm.errors import ArtifactError, RequestError
from edge_memllm.overlays.overlay import OverlaySpec
from edge_memllm.tensor_header import (
    DIGEST,
    PAGE,
    UNSEALED,
    FileKind,
    Tensors,
    data_bytes,
    header_bytes,
)

if TYPE_CHECKING:
    from hashlib import _Hash

KIND = FileKind(
    format="edge-memllm-overlay",
    version="1",
    name="overlay",
    meaning="an overlay",
    advice="Make one with 'edge-memllm overlay'.",
    anew="make the overlay again",
)
SUFFIX = ".overlay.safetensors"
MOST_ENTRIES = (1 << 32) - 1
# Behind the rows, in this order: the widest first, so that each column is aligned.
COLUMNS: dict[str, np.dtype[Any]] = {
    "tokens": np.dtype("<u4"),
    "places": np.dtype("<u4"),
    "factors": np.dtype("<f4"),
    "layers": np.dtype("<u2"),
    "operations": np.dtype("u1"),
}
_KEYS = ("name", "description", "identity", "layers", "width", "codec", "entries", "rows", "sha256")
_NUMBER = re.compile(r"0|[1-9][0-9]{0,9}")
_ANY = re.compile(r"(?s).*")


@dataclass(frozen=True, slots=True)
class Header:
    """What a header says."""

    spec: OverlaySpec
    entries: int
    rows: int
    sha256: str = UNSEALED  # of what stands behind the header, then the header with these zeros

    @property
    def size(self) -> int:
        """Bytes in front of the rows: told by the spec alone, so that it can be written last."""
        return len(Header(self.spec, MOST_ENTRIES, MOST_ENTRIES)._to_bytes(PAGE))

    @property
    def data_bytes(self) -> int:
        """Bytes behind the header."""
        return data_bytes(self.tensors)

    @property
    def tensors(self) -> Tensors:
        """What stands behind the header, in order."""
        columns = {name: (kind, (self.entries,)) for name, kind in COLUMNS.items()}
        return {"rows": (np.dtype("u1"), (self.rows, self.spec.row_bytes)), **columns}

    def to_bytes(self) -> bytes:
        """Return length, JSON, and spaces up to the size."""
        return self._to_bytes(self.size)

    def sealed(self, digest: _Hash) -> Header:
        """Return this header with its digest; `digest` has seen everything behind the header."""
        complete = digest.copy()
        complete.update(replace(self, sha256=UNSEALED).to_bytes())
        return replace(self, sha256=complete.hexdigest())

    @classmethod
    def parse(cls, data: bytes, where: str) -> Header:
        """Parse length and JSON. Raises `ArtifactError` for what `to_bytes` would not write."""
        header = _from_metadata(KIND.metadata(data, where, _KEYS), where)
        KIND.check_same(data, header.to_bytes(), where)
        return header

    def _to_bytes(self, unit: int) -> bytes:
        spec = self.spec
        metadata = {
            "format": KIND.format,
            "format_version": KIND.version,
            "name": spec.name,
            "description": spec.description,
            "identity": spec.identity,
            "layers": str(spec.layers),
            "width": str(spec.width),
            "codec": spec.codec,
            "entries": str(self.entries),
            "rows": str(self.rows),
            "sha256": self.sha256,
        }
        return header_bytes(metadata, self.tensors, unit)


def _from_metadata(fields: Fields, where: str) -> Header:
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
    return Header(spec, entries, rows, fields.text("sha256", DIGEST, "64 hex digits"))
