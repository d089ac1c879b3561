"""Prompt lookup: proposes the tokens that come next by looking where the text said this before.

No second model: the longest ending of the text that occurred earlier is found in an index, and
what followed it there is proposed. Whether a draft is right is for others to decide; told how
many were, it proposes more or fewer. Depends on tokens alone, never on time: the same text gives
the same drafts. Knows nothing of logits.
"""

from __future__ import annotations

from collections.abc import Iterable

# Lengths of the endings that are looked up, longest first. Shorter ones recur in any text and are
# mostly followed by something else: with them, drafts cost more than they saved.
ENDINGS = (4, 3)
FIRST_DRAFTS = 4
# Rounds in a row without a right draft before a rest, and how long the first and longest are.
MISSES_BEFORE_REST = 2
FIRST_REST = 4
LONGEST_REST = 64


class PromptLookup:
    """Drafts for one text. `most` is the most draft tokens of a round."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._text: list[int] = []
        self._followed: dict[tuple[int, ...], int] = {}  # n-gram: place behind its last occurrence
        self._drafts = min(FIRST_DRAFTS, most)
        self._misses = 0
        self._rest = FIRST_REST
        self._resting = 0

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens to the text."""
        text, followed = self._text, self._followed
        for token in tokens:
            # Entered only now that something follows it: the ending itself is never its own match.
            for length in ENDINGS:
                if length <= len(text):
                    followed[tuple(text[-length:])] = len(text)
            text.append(token)

    def propose(self, limit: int) -> list[int]:
        """Return at most `limit` tokens that may come next; none where the text is new."""
        if self._resting:
            self._resting -= 1
            return []
        place = self._match()
        if place is None:
            return []
        text = self._text
        drafts: list[int] = []
        period = len(text) - place
        for step in range(min(self._drafts, limit)):
            # Behind the end of the text the drafts themselves go on, as in a repeated pattern.
            drafts.append(text[place + step] if step < period else drafts[step - period])
        return drafts

    def learn(self, proposed: int, accepted: int) -> None:
        """Take how many of the proposed drafts were right."""
        if not proposed:
            return
        if accepted:
            self._misses, self._rest = 0, FIRST_REST
            longer = 2 * self._drafts if accepted == proposed else accepted
            self._drafts = min(max(longer, 1), self._most)
            return
        self._drafts = 1
        self._misses += 1
        if self._misses >= MISSES_BEFORE_REST:
            self._resting = self._rest
            self._rest = min(2 * self._rest, LONGEST_REST)

    def _match(self) -> int | None:
        """Return the place behind the last earlier occurrence of the longest ending."""
        text = self._text
        for length in ENDINGS:
            place = self._followed.get(tuple(text[-length:])) if length <= len(text) else None
            if place is not None:
                return place
        return None
