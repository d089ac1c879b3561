"""Records of small tables, and readers of files that are no table at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edge_memllm.artifact.layout import RecordLayout
from edge_memllm.codecs import get_codec
from edge_memllm.readers import Reader, Region, open_reader
from support.small_model import SmallArtifact

# Of the records that `write_artifact` writes when it is told nothing.
LAYOUT = RecordLayout(2, 64, get_codec("int8-g32"), "float16", 512)

# In the middle of a file of 6000 bytes, and aligned to nothing.
REGION = Region(start=100, size=5000, record_bytes=1000, stride=1000)
START, SIZE = REGION.start, REGION.size


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int64)


def offset_of(small: SmallArtifact, token: int) -> int:
    spec = small.manifest.table
    return spec.records_offset + token * spec.stride


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def open_(kind: str, path: Path) -> Reader:
    file = os.open(path, os.O_RDONLY)
    return open_reader("pread" if kind == "seek" else kind, file, str(path), REGION)


def buffers(sizes: Sequence[Sequence[int]]) -> list[list[bytearray]]:
    return [[bytearray(size) for size in parts] for parts in sizes]


def views(targets: list[list[bytearray]]) -> list[list[memoryview]]:
    return [[memoryview(part) for part in parts] for parts in targets]


def is_closed(file: int) -> bool:
    try:
        os.fstat(file)
    except OSError:
        return True
    return False
