"""Stop strings in streamed text, wherever the pieces happen to be cut.

Text that could be the beginning of a stop string is held back until it is clear. Knows strings
only: no tokens, no model.
"""

from __future__ import annotations

from collections.abc import Sequence

from edge_memllm.errors import RequestError

MAX_STOPS = 64
MAX_STOP_CHARACTERS = 4096


def check_stops(stop: str | Sequence[str]) -> tuple[str, ...]:
    """Return the stop strings as a tuple; one string stands for itself.

    Raises `RequestError` for an empty string, too many or too long ones, or anything else.
    """
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > MAX_STOPS:
        raise RequestError(f"{len(stops)} stop strings were given, expected at most {MAX_STOPS}.")
    for text in stops:
        if not isinstance(text, str):
            raise RequestError(f"stop holds {text!r}, expected strings only.")
        if not 1 <= len(text) <= MAX_STOP_CHARACTERS:
            raise RequestError(
                f"a stop string has {len(text)} characters, expected 1 to {MAX_STOP_CHARACTERS}."
            )
    return stops


class StopMatcher:
    """Lets text through up to the first stop string that is complete.

    When two are complete at the same character, the longer one counts. So the result depends on
    the text alone, not on how it was cut into pieces. Takes linear time.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._automata = [_PrefixAutomaton(text) for text in stops]
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Take the next piece and return what can be shown now; nothing after a stop."""
        if self.stopped:
            return ""
        self._held += text
        start = len(self._held) - len(text)
        for end in range(start + 1, len(self._held) + 1):
            matched = self._advance(self._held[end - 1])
            if matched:
                self.stopped = True
                return self._release(end - matched)
        open_prefix = max((automaton.matched for automaton in self._automata), default=0)
        return self._release(len(self._held) - open_prefix)

    def flush(self) -> str:
        """Return what is held back: the text has ended without a stop string."""
        return "" if self.stopped else self._release(len(self._held))

    def _advance(self, letter: str) -> int:
        """Feed one character to all; return the length of the longest complete stop string."""
        complete = 0
        for automaton in self._automata:
            if automaton.advance(letter):
                complete = max(complete, automaton.matched)
        return complete

    def _release(self, count: int) -> str:
        shown, self._held = self._held[:count], self._held[count:]
        return shown


class _PrefixAutomaton:
    """Counts with how many characters of one string the text so far ends (Knuth-Morris-Pratt)."""

    def __init__(self, text: str) -> None:
        self.matched = 0
        self._text = text
        self._fallback = [0] * len(text)
        for end in range(1, len(text)):
            self._fallback[end] = self._extend(self._fallback[end - 1], text[end])

    def advance(self, letter: str) -> bool:
        """Take one character; True when the whole string has just been seen."""
        self.matched = self._extend(self.matched, letter)
        return self.matched == len(self._text)

    def _extend(self, matched: int, letter: str) -> int:
        while matched and self._text[matched] != letter:
            matched = self._fallback[matched - 1]
        return matched + (self._text[matched] == letter)
