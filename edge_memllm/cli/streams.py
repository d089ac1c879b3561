"""Standard streams as a shell may leave them: closed, full, a pipe nobody reads, a narrow encoding.

Output that cannot be written is an error of its own, said once on stderr.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from contextlib import suppress
from typing import NoReturn, Self, TextIO

_OUTPUT = "standard output"


def prepare_streams() -> None:
    """Make all three usable, and their descriptors nobody else's.

    Python has None for a stream that is closed, and the next file to be opened gets its number: a
    library that prints would write into it.
    """
    held = os.open(os.devnull, os.O_RDWR)
    while held <= 2:
        held = os.open(os.devnull, os.O_RDWR)
    os.close(held)
    if sys.stdin is None:
        sys.stdin = _Closed("standard input")
    if sys.stdout is None:
        sys.stdout = _Closed(_OUTPUT)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - as long as we run
    if type(sys.stdout) is io.TextIOWrapper:
        sys.stdout = sys.__stdout__ = _Output.of(sys.stdout)  # type: ignore[misc]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # '?' for what a terminal's encoding lacks


def say(text: str) -> None:
    """Print a line on stderr, if anybody can have it."""
    try:
        print(text, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        _discard(sys.stderr)


def unwritten_output() -> OSError | None:
    """Write what was printed; return why that cannot be done, and let go of it."""
    found = sys.stdout.failure if isinstance(sys.stdout, _Output) else None
    try:
        sys.stdout.flush()
    except OSError as error:
        _discard(sys.stdout)
        return found or _of_output(error)
    except ValueError:  # somebody has closed it
        return OSError(errno.EBADF, os.strerror(errno.EBADF), _OUTPUT)
    return found


def _discard(stream: TextIO) -> None:
    """Point a stream at nothing, so that the interpreter's last flush is silent too."""
    with suppress(OSError, ValueError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)


def _of_output(error: OSError) -> OSError:
    return OSError(error.errno, error.strerror, _OUTPUT)


class _Output(io.TextIOWrapper):
    """Standard output whose errors say that they are its own, and are not forgotten.

    argparse overlooks them, and so would anybody who prints where they are not looked for.
    """

    failure: OSError | None = None

    @classmethod
    def of(cls, stream: io.TextIOWrapper) -> Self:
        """Take the place of a stream."""
        lines, through = stream.line_buffering, stream.write_through
        newline = None if os.name == "nt" else "\n"
        encoding, errors = stream.encoding, stream.errors
        return cls(stream.detach(), encoding, errors, newline, lines, through)

    def write(self, text: str) -> int:
        """Write as any stream does."""
        try:
            return super().write(text)
        except OSError as error:
            self.failure = _of_output(error)
            raise self.failure from error

    def flush(self) -> None:
        """Write what is held back."""
        try:
            super().flush()
        except OSError as error:
            self.failure = _of_output(error)
            raise self.failure from error


class _Closed(io.TextIOBase):
    """A stream that was closed when the program started: using it is an error that names it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def write(self, text: str) -> int:
        self._refuse()

    def read(self, size: int | None = -1) -> str:
        self._refuse()

    def readline(self, size: int = -1) -> str:  # type: ignore[override]
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF), self._name)
