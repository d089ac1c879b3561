"""The places in one cache of keys and values: what each holds, and which one a prompt gets.

What a finished reply leaves behind stays until its place is needed, so that a text that begins
the same way starts from there. Knows tokens and the cache; nothing of requests or threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import NamedTuple

from edge_memllm.engine.request import common_length
from edge_memllm.overlays.loaded import Selection
from edge_memllm.runtime_protocol import KVCache

# Moving fewer positions than this from another place is not worth the calls.
LEAST_COPY = 8


class Beginning(NamedTuple):
    """A prompt, and the records it is computed from: others give it other keys and values."""

    tokens: list[int]
    records: Selection

    def like(self, records: Selection | None) -> bool:
        """Return whether keys and values computed from `records` are those of this prompt too."""
        return (
            records is not None
            and records.source is self.records.source
            and records.memory_gain == self.records.memory_gain
        )


class Slot:
    """One place of the cache, and the tokens whose keys and values are there."""

    def __init__(self, place: int) -> None:
        self.place = place
        self.records: Selection | None = None
        self.tokens: list[int] = []
        self.prompt: list[int] = []
        self.parting = 0  # so much of the prompt another place has too, and goes on otherwise
        # As many from the front were computed in whole chunks, as a fresh prompt would be.
        self.whole_chunks = 0
        self.busy = False
        self.used = 0  # when it was last given back; 0 is never


class Slots:
    """All places of one cache; a common beginning is used again in multiples of `grain` tokens.

    With a grain of 1 any common beginning is used again. A larger one is the size of prefill
    chunks, and then only what was computed in whole chunks is used: the rest of a prompt is then
    cut, and so computed, as if nothing had been there.
    """

    def __init__(self, cache: KVCache, context: int, grain: int = 1) -> None:
        self._cache = cache
        self._context = context
        self._grain = grain
        self._slots = [Slot(place) for place in range(cache.batch)]
        self._clock = count(1)

    @property
    def free(self) -> int:
        """How many places nobody uses."""
        return sum(not slot.busy for slot in self._slots)

    def take(self, prompt: Beginning, *, reuse: bool = True) -> Slot:
        """Return a free place for a prompt, holding what it can already; at least one is free.

        At least the last token of the prompt is left to be computed.
        """
        free = [slot for slot in self._slots if not slot.busy]
        likest = max(free, key=lambda slot: self.common(slot, prompt))
        kept = self.common(likest, prompt) if reuse else 0
        # A text that goes on where it ended, not one that merely begins the same way, gets its
        # place: the others keep theirs, and what they share is copied.
        if not kept or (self._cache.copies and 2 * kept < len(likest.tokens)):
            likest, kept = min(free, key=lambda slot: slot.used), 0
        self.cut(likest, kept)
        likest.records, likest.busy = prompt.records, True
        likest.prompt, likest.parting = prompt.tokens, 0
        return likest

    def share(self, slot: Slot, prompt: Beginning) -> int:
        """Copy what another place holds of a prompt beyond what `slot` does; return how much."""
        if not self._cache.copies:
            return 0
        slot.parting = self._parting(slot, prompt) if self._cache.marks else 0
        source = max(self._slots, key=lambda other: self.common(other, prompt))
        length, held = self.common(source, prompt), len(slot.tokens)
        if length < held + LEAST_COPY:
            return 0
        self._cache.copy(slot.place, source.place, length)
        slot.tokens = prompt.tokens[:length]
        slot.whole_chunks = min(source.whole_chunks, length)
        self._mark_parting(slot)
        return length - held

    def common(self, slot: Slot, prompt: Beginning) -> int:
        """Return how much of a prompt, less its last token, could be used again from a place."""
        if not prompt.like(slot.records):
            return 0
        held = slot.tokens if self._grain == 1 else slot.tokens[: slot.whole_chunks]
        length = self._whole(common_length(held, prompt.tokens[:-1]))
        # Of layers with windows the place may no longer have what so much of it ends on.
        while (kept := self._cache.rewindable(slot.place, length)) != length:
            length = self._whole(kept)
        return length

    def worth_waiting(
        self, theirs: Slot, their_prompt: Beginning, own: Slot, prompt: Beginning
    ) -> bool:
        """Tell whether computing their prompt further will give something to copy to `own`."""
        if not self._cache.copies or not prompt.like(their_prompt.records):
            return False
        reach = self._whole(common_length(their_prompt.tokens, prompt.tokens[:-1]))
        return reach > len(theirs.tokens) and reach >= len(own.tokens) + LEAST_COPY

    def note_chunk(self, slot: Slot, chunk: Sequence[int]) -> None:
        """Note that a chunk of a prompt was appended to a place."""
        if slot.whole_chunks == len(slot.tokens) and len(chunk) == self._grain:
            slot.whole_chunks += self._grain
        slot.tokens += chunk
        if len(slot.tokens) == len(slot.prompt):
            self._cache.mark(slot.place)  # who asks again begins here
        self._mark_parting(slot)

    def next_chunk(self, slot: Slot, size: int) -> list[int]:
        """Return what is computed next of a prompt: `size` tokens, or up to where it parts."""
        begin = len(slot.tokens)
        end = begin + size
        if self._grain == 1 and begin < slot.parting < end:
            end = slot.parting
        return slot.prompt[begin:end]

    def cut(self, slot: Slot, length: int) -> None:
        """Forget what a place holds from `length` on, or what a failed step may have left.

        Where the cache does not have what so much of it ends on, all of it is forgotten.
        """
        length = self._cache.rewindable(slot.place, length)
        del slot.tokens[length:]
        slot.whole_chunks = min(slot.whole_chunks, length)
        self._cache.truncate(slot.place, length)

    def give_back(self, slot: Slot) -> None:
        """Let others have a place; what it holds can be used again until they do."""
        # A step may have to go over it: there must be room for the one token it then takes.
        self.cut(slot, min(len(slot.tokens), self._context - 1))
        slot.busy = False
        slot.used = next(self._clock)

    def gather(self, slots: Sequence[Slot], start: int = 0) -> range | None:
        """Bring slots together from a place on, and return the places that cover them.

        None if another text lies between, and a token that is fed to it cannot be taken back.
        """
        if self._cache.copies:
            goal = range(start, start + len(slots))
            outside = [slot for slot in slots if slot.place not in goal]
            for slot in self.at(goal):
                if slot not in slots:
                    self._swap(slot, outside.pop())
        places = [slot.place for slot in slots]
        covered = range(min(places), max(places) + 1)
        for slot in self.at(covered):
            if slot.busy and slot not in slots and not self._cache.revocable(slot.place):
                return None
        return covered

    def at(self, places: range) -> list[Slot]:
        """Return the slots of a range, in its order."""
        return self._slots[places.start : places.stop]

    def _parting(self, own: Slot, prompt: Beginning) -> int:
        """Return how much of a prompt another place has as well, or will have; 0 if little."""
        texts = [
            max(slot.tokens, slot.prompt, key=len) if slot.busy else slot.tokens
            for slot in self._slots
            if slot is not own and prompt.like(slot.records)
        ]
        common = max((common_length(text, prompt.tokens[:-1]) for text in texts), default=0)
        return self._whole(common) if common >= LEAST_COPY else 0

    def _mark_parting(self, slot: Slot) -> None:
        if slot.parting == len(slot.tokens):
            self._cache.mark(slot.place)

    def _whole(self, length: int) -> int:
        return length - length % self._grain

    def _swap(self, first: Slot, second: Slot) -> None:
        self._cache.swap(first.place, second.place)
        first.place, second.place = second.place, first.place
        self._slots[first.place], self._slots[second.place] = first, second
