"""What a model thinks before it answers, told apart from the answer, as the reply comes.

A template implies the marks around it, and may open it in the prompt itself. The result depends on
the text alone, not on how it was cut into pieces.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import NamedTuple


class ReasoningMarks(NamedTuple):
    """What stands before and behind a model's reasoning."""

    begin: str
    end: str


_KNOWN = (
    ReasoningMarks("<think>", "</think>"),
    ReasoningMarks("<seed:think>", "</seed:think>"),
    ReasoningMarks("[THINK]", "[/THINK]"),
    ReasoningMarks("<|START_THINKING|>", "<|END_THINKING|>"),
)


class Said(NamedTuple):
    """A piece of a reply."""

    text: str
    reasoned: bool  # not a part of the answer


class Reasoning(NamedTuple):
    """How one reply is read."""

    marks: ReasoningMarks
    begun: bool  # in the prompt


def reasoning_of(source: str | None, prompt: str) -> Reasoning | None:
    """Return how replies to a prompt are read, by the template it was made with; None as they are.

    A prompt that ends in the opening mark has opened it.
    """
    for marks in _KNOWN:
        if source is not None and marks.end in source:
            return Reasoning(marks, prompt.rstrip().endswith(marks.begin))
    return None


def closed(source: str | None, prompt: str) -> str:
    """Return a prompt without open reasoning: what its template opens ends at once."""
    found = reasoning_of(source, prompt)
    return prompt + found.marks.end if found is not None and found.begun else prompt


class _State(Enum):
    BEGINNING = auto()  # it is open whether there is any
    INSIDE = auto()
    BEHIND = auto()  # only white space has come since
    ANSWER = auto()


class ReasoningParser:
    """Reads one reply. White space at the ends of the reasoning is left out, as are the marks."""

    def __init__(self, reasoning: Reasoning) -> None:
        self._marks = reasoning.marks
        self._state = _State.INSIDE if reasoning.begun else _State.BEGINNING
        self._held = ""
        self._thought = False  # something that is no white space

    @property
    def open(self) -> bool:
        """Whether what comes next may be reasoning."""
        return self._state in (_State.BEGINNING, _State.INSIDE)

    @property
    def inside(self) -> bool:
        """Whether what comes next is reasoning, up to the mark behind it."""
        return self._state is _State.INSIDE

    def push(self, text: str) -> list[Said]:
        """Take the next piece and return what is certain now."""
        return self._read(text, final=False)

    def flush(self) -> list[Said]:
        """Return what was held back: the reply has ended."""
        return self._read("", final=True)

    def _read(self, text: str, *, final: bool) -> list[Said]:
        self._held += text
        found: list[Said] = []
        if self._state is _State.BEGINNING:
            self._begin(final=final)
        if self._state is _State.INSIDE:
            self._think(found, final=final)
        if self._state is _State.BEHIND:
            self._held = self._held.lstrip()
            if self._held:
                self._state = _State.ANSWER
        if self._state is _State.ANSWER and self._held:
            found.append(Said(self._held, False))
            self._held = ""
        return found

    def _begin(self, *, final: bool) -> None:
        written = self._held.lstrip()
        if written.startswith(self._marks.begin):
            self._held = written.removeprefix(self._marks.begin)
            self._state = _State.INSIDE
        elif final or not self._marks.begin.startswith(written):
            self._state = _State.ANSWER

    def _think(self, found: list[Said], *, final: bool) -> None:
        end = self._held.find(self._marks.end)
        until = end if end >= 0 else len(self._held) - self._open_mark(final=final)
        thought = self._held[:until]
        shown = thought.rstrip()
        if end >= 0:
            self._held = self._held[end + len(self._marks.end) :]
            self._state = _State.BEHIND
        else:
            self._held = self._held[len(shown) :]  # white space may stand before the end
        if not self._thought:
            shown = shown.lstrip()
        if shown:
            self._thought = True
            found.append(Said(shown, True))

    def _open_mark(self, *, final: bool) -> int:
        """Return how many characters at the end may be the beginning of the mark."""
        if final:
            return 0
        longest = min(len(self._marks.end) - 1, len(self._held))
        return next(
            (n for n in range(longest, 0, -1) if self._held.endswith(self._marks.end[:n])), 0
        )
