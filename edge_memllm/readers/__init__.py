"""The readers this version knows, by name. To add one: one file, one branch here."""

from __future__ import annotations

import os
from typing import Literal, TypeAlias, get_args

from edge_memllm.errors import RequestError
from edge_memllm.readers.choice import choose_reader
from edge_memllm.readers.direct import DirectReader
from edge_memllm.readers.in_memory import MmapReader, RamReader
from edge_memllm.readers.pread import PreadReader
from edge_memllm.readers.reader import Reader, Region
from edge_memllm.readers.uring import UringReader

__all__ = ["Reader", "ReaderName", "Region", "open_reader", "reader_names"]

ReaderName: TypeAlias = Literal["auto", "pread", "direct", "uring", "mmap", "ram"]


def reader_names() -> tuple[str, ...]:
    """Return what may be asked for; "auto" stands for the best of the others."""
    return get_args(ReaderName)


def open_reader(
    name: str, file: int, where: str, region: Region, *, cached: bool = False
) -> Reader:
    """Return a reader for the records in `region` of an open file, which it takes over.

    `where` names the file in messages; the reader's `name` and `reason` say what "auto" chose,
    for which it matters whether records are `cached` in front of the reader.
    Raises `RequestError` for an unknown name or a reader that does not work here, and
    `StorageError`; the file is closed then.
    """
    match name:
        case "auto":
            return choose_reader(file, where, region, cached=cached)
        case "pread":
            return PreadReader(file, where)
        case "direct":
            return DirectReader(file, where, region)
        case "uring":
            return UringReader(file, where, region)
        case "mmap":
            return MmapReader(file, where, region)
        case "ram":
            return RamReader(file, where, region)
    os.close(file)
    raise RequestError(f"Unknown reader '{name}', expected one of {', '.join(reader_names())}.")
