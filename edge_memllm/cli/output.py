"""Figures and tables as people read them, and JSON as programs do. Prints nothing but JSON."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self, TextIO

from edge_memllm.errors import RequestError
from edge_memllm.progress import PACKING

if TYPE_CHECKING:
    from tqdm import tqdm

    from edge_memllm.artifact.manifest import TableSpec


_OUTPUT = "standard output"
_QUIET = 0.5  # seconds in which a command shows nothing of how far it is
_LINE_SECONDS = 10.0  # between two lines of a stage, in a log


def write_json(value: Mapping[str, Any]) -> None:
    """Print ``value`` as the one JSON object of a command."""
    print(json.dumps(value, indent=2, allow_nan=False))


def byte_count(count: float) -> str:
    """A size in decimal units, as drives are sold: ``1,536 B``, ``12.3 MB``, ``6.46 GB``."""
    if count < 10_000:
        return f"{count:,.0f} B"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 999.5:
            return f"{count:.3g} {unit}"
    return f"{count / 1000:.3g} TB"


def table_codecs(stored: TableSpec) -> str:
    """How a table stores rows, and embeddings where the graph is not fed them as they are."""
    from edge_memllm.codecs import PLAIN_CODECS  # needs numpy, which help does without

    if stored.embedding_codec == PLAIN_CODECS[stored.embedding_dtype]:
        return stored.codec
    return f"{stored.codec}, embeddings {stored.embedding_codec}"


def number(value: float) -> str:
    """A whole number with thousands separated."""
    return f"{value:,.0f}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to one width each, two spaces between, the last one ragged."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
    return "\n".join(lines)


def read_text(path: Path) -> str:
    """Return the text of a file, which must be UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{path}: byte {error.start} is not UTF-8 text. Convert the file to UTF-8."
        ) from error


def read_standard_input() -> str:
    """Return what is piped in, without the line break that a shell puts at its end."""
    try:
        text = sys.stdin.read().removesuffix("\n")
        text.encode()  # some locales let bytes through that are no text, as half surrogates
    except UnicodeError as error:
        raise RequestError("Standard input is not UTF-8 text. Convert it to UTF-8.") from error
    return text


def confirmed(question: str) -> bool | None:
    """Ask at the terminal, where the answer is yes unless it says no; None without a terminal."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return None
    while True:
        print(f"{question} [Y/n] ", end="", file=sys.stderr, flush=True)
        answer = sys.stdin.readline()
        match answer.strip().lower():
            case "y" | "yes":
                return True
            case "n" | "no":
                return False
            case "":
                return bool(answer)  # nothing at all is the end of the input


class StageBars:
    """Callable as ``bars(stage, done, total)``: a bar for each stage, without a terminal lines."""

    def __init__(self) -> None:
        self._stage = ""
        self._shown: tqdm[None] | _StageLines | None = None
        self._began = monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` steps of ``stage`` are done."""
        if stage == PACKING:  # nothing is heard for a minute, so it is said at once
            self.end_stage()
            if not done:
                say(f"{stage}: ...")
            return
        if self._shown is None or stage != self._stage:
            self._start(stage, total)
        assert self._shown is not None
        self._shown.update(done - self._shown.n)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end_stage()

    def end_stage(self) -> None:
        """Let the terminal have other lines: the bar, if there is one, is done with."""
        if self._shown is not None:
            self._shown.close()
            self._shown = None

    def _start(self, stage: str, total: int) -> None:
        from tqdm import tqdm

        self.end_stage()
        self._stage = stage
        if not sys.stderr.isatty():
            self._shown = _StageLines(stage, total, self._began)
            return
        # Work that is done at once shows no bar.
        self._shown = tqdm(
            total=total, desc=f"{stage:<8}", file=sys.stderr, dynamic_ncols=True, delay=_QUIET
        )


class _StageLines:
    """What a log gets of a stage: a line when it begins, every ten seconds, and when it ends.

    A command is silent at first: what is done at once leaves no line.
    """

    def __init__(self, stage: str, total: int, command_began: float) -> None:
        self.n = 0
        self._stage, self._total = stage, total
        self._began = monotonic()
        self._quiet_until = command_began + _QUIET
        self._last: float | None = None  # when a line was printed
        if self._began >= self._quiet_until:
            self._print("", self._began)

    def update(self, more: int) -> None:
        """Count steps that were done since, and say so if it is time."""
        self.n += more
        now = monotonic()
        due = self._quiet_until if self._last is None else self._last + _LINE_SECONDS
        if now >= due and self.n < self._total:
            self._print(self._figures(now), now)

    def close(self) -> None:
        """Say how long it took, unless it was done at once."""
        now = monotonic()
        if self._last is not None and now - self._began >= _QUIET:
            self._print(self._figures(now), now)

    def _figures(self, now: float) -> str:
        return f"{self.n:,} of {self._total:,}, {now - self._began:.0f} s"

    def _print(self, figures: str, now: float) -> None:
        print(f"{self._stage}: {figures or '...'}", file=sys.stderr, flush=True)
        self._last = now


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


_STYLES = {"error": "1;31", "aside": "2"}


def styled(text: str, style: str, stream: TextIO) -> str:
    """Return text in a style for a terminal that shows styles; plain under NO_COLOR."""
    return f"\x1b[{_STYLES[style]}m{text}\x1b[0m" if _shows_styles(stream) else text


def _shows_styles(stream: TextIO) -> bool:
    environment = os.environ
    if environment.get("NO_COLOR") or environment.get("TERM") == "dumb" or not stream.isatty():
        return False
    return os.name != "nt" or "WT_SESSION" in environment  # the older console prints the codes


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
