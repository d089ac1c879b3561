"""The readers this version knows, by name. To add one: one file, one branch here."""

from __future__ import annotations

import os

from edge_memllm.errors import RequestError
from edge_memllm.readers.pread import PreadReader
from edge_memllm.readers.ram import RamReader
from edge_memllm.readers.reader import Reader

__all__ = ["Reader", "open_reader", "reader_names"]


def reader_names() -> tuple[str, ...]:
    """Return what may be asked for; "auto" stands for the best of the others."""
    return ("auto", "pread", "ram")


def open_reader(name: str, file: int, where: str, start: int, size: int) -> Reader:
    """Return a reader for bytes [start, start + size) of an open file, which it takes over.

    `where` names the file in messages; the reader's own `name` says what "auto" chose.
    Raises `RequestError` for an unknown name, and `StorageError`; the file is closed then.
    """
    match name:
        case "auto" | "pread":
            return PreadReader(file, where)
        case "ram":
            return RamReader(file, where, start, size)
    os.close(file)
    raise RequestError(f"Unknown reader '{name}', expected one of {', '.join(reader_names())}.")
