"""The header of a session file: safetensors JSON that its values and the model determine.

Writing builds it, reading builds it again and compares: nothing else is accepted.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from edge_memllm.errors import ArtifactError, RequestError
from edge_memllm.runtime_protocol import HeldLayout
from edge_memllm.sampling import SEED_LIMIT, Sampling
from edge_memllm.session_state import Origin
from edge_memllm.strict_json import Fields, parse_json_object
from edge_memllm.table_header import LENGTH

FORMAT = "edge-memllm-session"
FORMAT_VERSION = "1"
MOST_TOKENS = 1 << 24

_DTYPES = {"float32": "F32", "float16": "F16", "int8": "I8", "uint32": "U32", "uint64": "U64"}
_METADATA = ("format", "format_version", "session", "sha256")
_ORIGIN = ("identity", "artifact", "codec", "overlays", "digests")
_FIELDS = (*_ORIGIN, "tokens", "computed", "logits", "sampling", "seed", "draws")
_UNSEALED = "0" * 64
_DIGEST = re.compile(r"[0-9a-f]{64}")
_HALF = re.compile(r"[0-9a-f]{32}")
_OBJECT = re.compile(r"(?s)\{.*")
_NAME = re.compile(r"(?s).{1,80}")


@dataclass(frozen=True, slots=True)
class Header:
    """What a header says; the tensors follow from it and from the model."""

    origin: Origin
    tokens: int
    computed: int
    logits: int  # V, or 0 when there are none
    sampling: Sampling
    seed: int
    draws: tuple[str, str]  # state and increment of PCG64
    sha256: str = _UNSEALED  # of the header with these zeros, then of what stands behind it

    def arrays(self, layout: HeldLayout) -> HeldLayout:
        """Return what stands behind the header, in order: the widest first, so all is aligned."""
        every = layout | {
            "logits": (np.dtype(np.float32), (self.logits,)),
            "tokens": (np.dtype(np.uint32), (self.tokens,)),
        }
        return dict(sorted(every.items(), key=lambda item: (-item[1][0].itemsize, item[0])))

    def to_bytes(self, layout: HeldLayout) -> bytes:
        """Return length and JSON, padded to whole words."""
        content: dict[str, object] = {"__metadata__": self._metadata()}
        start = 0
        for name, (kind, shape) in self.arrays(layout).items():
            end = start + array_bytes(kind, shape)
            content[name] = {
                "dtype": _DTYPES[kind.name],
                "shape": list(shape),
                "data_offsets": [start, end],
            }
            start = end
        data = _compact(content).encode("ascii")
        room = -(-len(data) // LENGTH.size) * LENGTH.size
        return LENGTH.pack(room) + data.ljust(room)

    def digest(self, layout: HeldLayout) -> Any:
        """Return a sha256 that has seen the header; what stands behind it is to follow."""
        return hashlib.sha256(replace(self, sha256=_UNSEALED).to_bytes(layout))

    def _metadata(self) -> dict[str, str]:
        said = asdict(self.origin) | {
            name: getattr(self, name) for name in ("computed", "draws", "logits", "seed", "tokens")
        }
        said["sampling"] = asdict(self.sampling)
        values = (FORMAT, FORMAT_VERSION, _compact(said), self.sha256)
        return dict(zip(_METADATA, values, strict=True))

    @classmethod
    def parse(cls, data: bytes, where: str) -> Header:
        """Parse what stands behind the length. Raises `ArtifactError`."""
        content = parse_json_object(data, where)
        metadata = content.get("__metadata__")
        if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
            raise ArtifactError(f"{where}: this is not a saved session (no format '{FORMAT}').")
        if metadata.get("format_version") != FORMAT_VERSION:
            found = f"{metadata.get('format_version')!a:.20}"
            raise ArtifactError(
                f"{where}: session format version {found}, this version reads '{FORMAT_VERSION}'. "
                "Upgrade edge-memllm or begin a new session."
            )
        fields = Fields(metadata, where, _METADATA)
        session = fields.text("session", re.compile(r"(?s)\{.*"), "a JSON object as text")
        said = Fields(parse_json_object(session.encode(), where), f"{where}: session", _FIELDS)
        return _parsed(said, fields.text("sha256", _DIGEST, "64 hex digits"), where)


def array_bytes(kind: np.dtype[Any], shape: tuple[int, ...]) -> int:
    """Return the bytes of an array."""
    return kind.itemsize * math.prod(shape)


def _parsed(said: Fields, digest: str, where: str) -> Header:
    tokens = said.integer("tokens", 0, MOST_TOKENS)
    computed = said.integer("computed", 0, tokens)
    overlays = said.texts("overlays", _NAME, "names of overlays")
    digests = said.texts("digests", _DIGEST, "64 hex digits each")
    draws = said.texts("draws", _HALF, "32 hex digits each")
    logits = said.integer("logits", 0, MOST_TOKENS)
    if (
        len(digests) != len(overlays)
        or len(draws) != 2
        or int(draws[1], 16) % 2 == 0
        or bool(logits) != (0 < tokens == computed)
    ):
        raise ArtifactError(f"{where}: its numbers cannot be those of a session. Save it again.")
    try:
        sampling = Sampling(**Fields(said.mapping("sampling"), where, asdict(Sampling())).values)
    except RequestError as error:
        raise ArtifactError(f"{where}: {error}") from error
    origin = Origin(
        said.text("identity", _NAME, "a model's identity"),
        said.text("artifact", _DIGEST, "64 hex digits"),
        said.text("codec", _NAME, "a codec"),
        overlays,
        digests,
    )
    seed = said.integer("seed", 0, SEED_LIMIT - 1)
    return Header(origin, tokens, computed, logits, sampling, seed, (draws[0], draws[1]), digest)


def _compact(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
