"""Which tokens are computed next: prompts chunk by chunk, and between chunks all texts by one.

A prompt never holds up texts under way for more than one chunk, and never waits for more than one
other. All texts advance in one step, so that each distinct token's record is read once; or each
in its own, where a text must not depend on its neighbours to the last bit. Not thread-safe.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from edge_memllm.engine.reply import Choice
from edge_memllm.engine.slots import Slot, Slots
from edge_memllm.errors import EdgeMemLLMError
from edge_memllm.feeding import Feeder
from edge_memllm.runtime_protocol import StepLogits

# How much of the expected time of a choice the last one decides.
_NEWS = 0.2

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """A view of an engine: what goes on now, and sums since it began."""

    slots: int
    under_way: int  # choices that have a place
    queued: int  # choices that wait for one
    kv_bytes: int
    requests: int  # taken into the queue
    refused: int  # because the queue was full, or the engine is ending
    finished: int  # choices with a finish reason
    given_up: int  # choices cancelled, out of time or failed
    prompt_tokens: int  # that were computed
    reused_tokens: int  # of prompts, that did not need to be
    completion_tokens: int
    steps: int  # in which texts grew
    records_read: int
    bytes_read: int

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as a dict for JSON."""
        return asdict(self)


@dataclass(slots=True)
class Tally:
    """The sums while they grow."""

    requests: int = 0
    refused: int = 0
    finished: int = 0
    given_up: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    completion_tokens: int = 0
    steps: int = 0
    choice_seconds: float = 1.0  # that a choice has a place, by the last ones

    def note_finished(self, seconds: float) -> None:
        """Count a choice that came to its end after so long in its place."""
        self.finished += 1
        self.choice_seconds += _NEWS * (seconds - self.choice_seconds)


class Scheduler:
    """Advances choices in the slots of one feeder, whose cache has one place for each.

    `chunk` tokens of a prompt are computed at a time. With `invariant`, each text gets bit for
    bit what it would get alone: texts advance one after the other, and only whole chunks of
    prompts are used again.
    """

    def __init__(
        self, feeder: Feeder, context: int, chunk: int, tally: Tally, *, invariant: bool
    ) -> None:
        self._feeder = feeder
        self._chunk = chunk
        self._tally = tally
        self._invariant = invariant
        self._slots = Slots(feeder.cache, context, chunk if invariant else 1)
        self._places: dict[Choice, Slot] = {}
        self._filling: list[Choice] = []  # with a prompt not all computed, oldest first
        self._growing: list[Choice] = []
        self._oldest_next = True

    @property
    def free(self) -> int:
        """How many more choices there is a place for."""
        return self._slots.free

    @property
    def under_way(self) -> int:
        """How many choices have a place."""
        return len(self._places)

    def admit(self, choice: Choice) -> None:
        """Give a choice a place; there must be a free one."""
        slot = self._slots.take(choice.beginning, reuse=not choice.scores_prompt)
        choice.begin()
        self._note_reused(choice, len(slot.tokens))
        self._places[choice] = slot
        self._filling.append(choice)

    def advance(self) -> None:
        """Compute one chunk of one prompt, and one token of every text.

        What goes wrong with one choice ends that one. Raises what leaves no cache to go on with.
        """
        for choice in list(self._places):
            if choice.over():
                self._dismiss(choice)
        if self._filling:
            self._fill(self._next_to_fill())
        if self._growing:
            self._grow()

    def give_up(self, error: BaseException) -> None:
        """End every choice with an error; the cache may be gone already."""
        self._tally.given_up += len(self._places)
        self.fail_all(error)

    def fail_all(self, error: BaseException) -> None:
        """Tell those who wait for any choice that it failed; from any thread, amid a step too."""
        for choice in list(self._places):
            choice.fail(error)

    def _next_to_fill(self) -> Choice:
        """Return, in turns, the prompt that waits longest and the one with the least left.

        One whose beginning another is computing at the moment waits for that, to copy it.
        """
        self._oldest_next = not self._oldest_next
        ready = [
            choice
            for place, choice in enumerate(self._filling)
            if not any(self._will_serve(older, choice) for older in self._filling[:place])
        ]
        return min(ready, key=self._left) if self._oldest_next else ready[0]

    def _left(self, choice: Choice) -> int:
        return len(choice.prompt) - len(self._places[choice].tokens)

    def _will_serve(self, older: Choice, choice: Choice) -> bool:
        if choice.scores_prompt:
            return False
        theirs, own = self._places[older], self._places[choice]
        return self._slots.worth_waiting(theirs, older.beginning, own, choice.beginning)

    def _fill(self, choice: Choice) -> None:
        slot, prompt = self._places[choice], choice.prompt
        if not choice.scores_prompt:
            self._note_reused(choice, self._slots.share(slot, choice.beginning))
        begin = len(slot.tokens)
        chunk = prompt[begin : begin + self._chunk]
        self._feeder.use(choice.beginning.source)
        try:
            logits = self._feed_chunk(choice, slot, chunk)
            if logits is not None:
                self._filling.remove(choice)
                self._growing.append(choice)
                self._hand_over(choice, logits)
        except BaseException as error:
            self._lose(choice, error)

    def _feed_chunk(self, choice: Choice, slot: Slot, chunk: list[int]) -> StepLogits | None:
        """Append a chunk to a slot; return the logits [V] behind the prompt if it is the last."""
        begin, feeder = len(slot.tokens), self._feeder
        end = begin + len(chunk)
        logits: StepLogits | None = None
        if choice.scores_prompt:
            every = feeder.score(slot.place, chunk)
            choice.note_prompt(every, begin)
            logits = every[-1]
        elif end == len(choice.prompt):
            logits = feeder.prefill(slot.place, chunk)
        else:
            feeder.skip(slot.place, chunk)
        choice.note_fed(begin, chunk, feeder.fetched)
        self._slots.note_chunk(slot, chunk)
        self._tally.prompt_tokens += len(chunk)
        if end < len(choice.prompt):
            feeder.announce(choice.prompt[end : end + self._chunk])
            return None
        return logits

    def _grow(self) -> None:
        """Advance every text by a token; those with the same records together."""
        groups: dict[int, list[Choice]] = {}
        # In the order in which they lie, so that groups stay where they are.
        for choice in sorted(self._growing, key=lambda each: self._places[each].place):
            groups.setdefault(id(choice.beginning.source), []).append(choice)
        start = 0
        for choices in groups.values():
            self._feeder.use(choices[0].beginning.source)
            self._tally.steps += 1
            if self._invariant or not self._grow_together(choices, start):
                for choice in choices:
                    self._grow_alone(choice)
            start += len(choices)
            self._feeder.announce(
                dict.fromkeys(each.sequence.tokens[-1] for each in choices if not each.finished)
            )

    def _grow_together(self, choices: Sequence[Choice], start: int) -> bool:
        """Advance some in one step; False if that failed, and each must be tried by itself."""
        owners = {self._places[choice]: choice for choice in choices}
        places = self._slots.gather(list(owners), start)
        slots = self._slots.at(places)
        filler = choices[0].sequence.tokens[-1]  # for places between: their records are there
        fed = [owners[slot].sequence.tokens[-1] if slot in owners else filler for slot in slots]
        everywhere = len(places) == self._feeder.cache.batch
        try:
            logits = self._feeder.decode(fed, None if everywhere else places)
        except BaseException:
            if self._feeder.cache.closed:
                raise
            return False
        for number, (slot, row) in enumerate(zip(slots, logits, strict=True)):
            if slot in owners:
                self._take(owners[slot], slot, row, fed[:number])
            else:
                self._slots.cut(slot, len(slot.tokens))
        return True

    def _grow_alone(self, choice: Choice) -> None:
        slot = self._places[choice]
        try:
            logits = self._feeder.decode(
                choice.sequence.tokens[-1:], range(slot.place, slot.place + 1)
            )
        except BaseException as error:
            self._lose(choice, error)
        else:
            self._take(choice, slot, logits[0])

    def _take(
        self, choice: Choice, slot: Slot, logits: StepLogits, before: Sequence[int] = ()
    ) -> None:
        token = choice.sequence.tokens[-1]
        choice.note_fed(len(slot.tokens), [token], self._feeder.fetched, before)
        slot.tokens.append(token)
        self._hand_over(choice, logits)

    def _hand_over(self, choice: Choice, logits: StepLogits) -> None:
        """Let a choice take its next token. What a constraint raises, too, is its own affair."""
        before = len(choice.sequence.tokens)
        try:
            choice.take(logits)
        except BaseException as error:
            choice.fail(error)
            self._dismiss(choice)
            return
        self._tally.completion_tokens += len(choice.sequence.tokens) - before
        if choice.finished:
            self._tally.note_finished(choice.served_seconds)
            self._release(choice)

    def _lose(self, choice: Choice, error: BaseException) -> None:
        """End a choice whose step failed; raises the error if no other can go on either."""
        if self._feeder.cache.closed:
            raise error
        if not isinstance(error, EdgeMemLLMError):
            _log.error("a step failed, and with it one reply", exc_info=error)
        choice.fail(error)
        self._dismiss(choice)

    def _dismiss(self, choice: Choice) -> None:
        self._tally.given_up += 1
        self._release(choice)

    def _release(self, choice: Choice) -> None:
        self._slots.give_back(self._places.pop(choice))
        for group in (self._filling, self._growing):
            if choice in group:
                group.remove(choice)

    def _note_reused(self, choice: Choice, count: int) -> None:
        choice.reused += count
        self._tally.reused_tokens += count
