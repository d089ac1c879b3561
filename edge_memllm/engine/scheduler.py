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

from edge_memllm.engine.feeding import Feeder
from edge_memllm.engine.reply import CollectedText, Generation
from edge_memllm.engine.request import CheckedRequest
from edge_memllm.engine.slots import Slot, Slots
from edge_memllm.errors import EdgeMemLLMError
from edge_memllm.overlays.loaded import Selection
from edge_memllm.runtime_protocol import StepLogits
from edge_memllm.text.tokenization import Tokenizer

# How much of the expected time of a text the last one decides.
_NEWS = 0.2

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class EngineStatistics:
    """What goes on in an engine now, and sums since it began."""

    slots: int = 0
    under_way: int = 0  # texts that have a place
    queued: int = 0  # texts that wait for one
    kv_bytes: int = 0
    requests: int = 0  # taken into the queue
    refused: int = 0  # because the queue was full, or the engine is ending
    finished: int = 0  # texts with a finish reason
    given_up: int = 0  # texts cancelled, out of time or failed
    prompt_tokens: int = 0  # that were computed
    reused_tokens: int = 0  # of prompts, that did not need to be
    completion_tokens: int = 0
    draft_tokens: int = 0  # proposed by speculation
    accepted_tokens: int = 0  # of those, what was chosen
    steps: int = 0  # in which texts grew
    records_read: int = 0
    bytes_read: int = 0
    text_seconds: float = 1.0  # that a text has a place, by the last ones

    def note_finished(self, seconds: float) -> None:
        """Count a text that came to its end after so long in its place."""
        self.finished += 1
        self.text_seconds += _NEWS * (seconds - self.text_seconds)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as a dict for JSON."""
        return asdict(self)


class Scheduler:
    """Advances texts in the slots of one feeder, whose cache has one place for each.

    `chunk` tokens of a prompt are computed at a time. With `invariant`, each text gets bit for
    bit what it would get alone: texts advance one after the other, and only whole chunks of
    prompts are used again.
    """

    def __init__(
        self,
        feeder: Feeder,
        context: int,
        chunk: int,
        statistics: EngineStatistics,
        *,
        invariant: bool,
    ) -> None:
        self._feeder = feeder
        self._chunk = chunk
        self._statistics = statistics
        self._invariant = invariant
        self._slots = Slots(feeder.cache, context, chunk if invariant else 1)
        self._places: dict[Generation, Slot] = {}
        self._filling: list[Generation] = []  # with a prompt not all computed, oldest first
        self._growing: list[Generation] = []
        self._oldest_next = True

    @property
    def free(self) -> int:
        """How many more texts there is a place for."""
        return self._slots.free

    @property
    def under_way(self) -> int:
        """How many texts have a place."""
        return len(self._places)

    def admit(self, text: Generation) -> None:
        """Give a text a place; there must be a free one."""
        slot = self._slots.take(text.beginning, reuse=not text.fresh)
        text.begin()
        self._note_reused(text, len(slot.tokens))
        self._places[text] = slot
        self._filling.append(text)

    def advance(self) -> None:
        """Compute one chunk of one prompt, and one token of every text.

        What goes wrong with one text ends that one. Raises what leaves no cache to go on with.
        """
        for text in list(self._places):
            if text.over():
                self._dismiss(text)
        if self._filling:
            self._fill(self._next_to_fill())
        if self._growing:
            self._grow()

    def complete(self) -> None:
        """Compute all that was admitted to its end: every prompt, then all texts together."""
        while self._filling:
            self._fill(self._next_to_fill())
        while self._growing:
            self._grow()

    def give_up(self, error: BaseException) -> None:
        """End every text with an error; the cache may be gone already."""
        self._statistics.given_up += len(self._places)
        self.fail_all(error)

    def fail_all(self, error: BaseException) -> None:
        """Tell those who wait for any text that it failed; from any thread, amid a step too."""
        for text in list(self._places):
            text.fail(error)

    def _next_to_fill(self) -> Generation:
        """Return, in turns, the prompt that waits longest and the one with the least left.

        One whose beginning another is computing at the moment waits for that, to copy it.
        """
        self._oldest_next = not self._oldest_next
        ready = [
            text
            for place, text in enumerate(self._filling)
            if not any(self._will_serve(older, text) for older in self._filling[:place])
        ]
        return min(ready, key=self._left) if self._oldest_next else ready[0]

    def _left(self, text: Generation) -> int:
        return len(text.prompt) - len(self._places[text].tokens)

    def _will_serve(self, older: Generation, text: Generation) -> bool:
        if text.fresh:
            return False
        theirs, own = self._places[older], self._places[text]
        return self._slots.worth_waiting(theirs, older.beginning, own, text.beginning)

    def _fill(self, text: Generation) -> None:
        slot = self._places[text]
        if not text.fresh:
            self._note_reused(text, self._slots.share(slot, text.beginning))
        if len(slot.tokens) == text.reused:
            text.note_progress(text.reused)
        chunk = self._slots.next_chunk(slot, self._chunk)
        records = text.beginning.records
        self._feeder.use(records.source, records.memory_gain)
        try:
            logits = self._feed_chunk(text, slot, chunk)
            if logits is not None:
                self._filling.remove(text)
                self._growing.append(text)
                self._hand_over(text, logits)
        except BaseException as error:
            self._lose(text, error)

    def _feed_chunk(self, text: Generation, slot: Slot, chunk: list[int]) -> StepLogits | None:
        """Append a chunk to a slot; return the logits [V] behind the prompt if it is the last."""
        begin, feeder = len(slot.tokens), self._feeder
        end = begin + len(chunk)
        logits: StepLogits | None = None
        if text.scores_prompt:
            every = feeder.score(slot.place, chunk)
            text.note_prompt(every, begin)
            logits = every[-1]
        elif end == len(text.prompt):
            logits = feeder.prefill(slot.place, chunk)
        else:
            feeder.skip(slot.place, chunk)
        text.note_fed(begin, chunk, feeder.fetched)
        self._slots.note_chunk(slot, chunk)
        self._statistics.prompt_tokens += len(chunk)
        text.note_progress(end)
        if end < len(text.prompt):
            feeder.announce(text.prompt[end : end + self._chunk])
            return None
        return logits

    def _grow(self) -> None:
        """Advance every text by a token; those with the same records together."""
        groups: dict[Any, list[Generation]] = {}
        # In the order in which they lie, so that groups stay where they are.
        for text in sorted(self._growing, key=lambda each: self._places[each].place):
            records = text.beginning.records
            groups.setdefault((records.source, records.memory_gain), []).append(text)
        start = 0
        for (source, memory_gain), texts in groups.items():
            self._feeder.use(source, memory_gain)
            self._statistics.steps += 1
            alone = self._invariant or len(self._growing) == 1
            if not alone:
                for text in texts:
                    text.note_shared_step()
            if alone or not self._grow_together(texts, start):
                for text in texts:
                    self._grow_alone(text, drafting=alone)
            start += len(texts)
            self._feeder.announce(
                dict.fromkeys(each.sequence.tokens[-1] for each in texts if not each.finished)
            )

    def _grow_together(self, texts: Sequence[Generation], start: int) -> bool:
        """Advance some in one step; False if that cannot be, and each must be tried by itself."""
        owners = {self._places[text]: text for text in texts}
        places = self._slots.gather(list(owners), start)
        if places is None:
            return False
        slots = self._slots.at(places)
        filler = texts[0].sequence.tokens[-1]  # for places between: their records are there
        fed = [owners[slot].sequence.tokens[-1] if slot in owners else filler for slot in slots]
        everywhere = len(places) == self._feeder.cache.batch
        try:
            logits = self._feeder.decode(fed, None if everywhere else places)
        except BaseException as error:
            if self._is_for_all(error):
                raise
            return False
        for number, (slot, row) in enumerate(zip(slots, logits, strict=True)):
            if slot in owners:
                self._take(owners[slot], slot, row, fed[:number])
            else:
                self._slots.cut(slot, len(slot.tokens))
        return True

    def _grow_alone(self, text: Generation, *, drafting: bool) -> None:
        """Advance a text in a step of its own, which may verify drafts of its next tokens too."""
        slot = self._places[text]
        try:
            room = self._feeder.cache.revocable(slot.place) - 1
            drafts = text.drafts(room) if drafting else []
            fed = [text.sequence.tokens[-1], *drafts]
            logits = self._feeder.verify(fed, slot.place)
        except BaseException as error:
            self._lose(text, error)
        else:
            self._take_while_right(text, slot, fed, logits)

    def _take_while_right(
        self, text: Generation, slot: Slot, fed: Sequence[int], logits: StepLogits
    ) -> None:
        """Let a text take what follows each token fed, up to the first draft that was wrong."""
        accepted = 0
        for number, row in enumerate(logits):
            self._take(text, slot, row, fed[:number])
            right = fed[number + 1 : number + 2] == text.sequence.tokens[-1:]
            accepted += right
            if text not in self._places or not right:
                break
        self._statistics.draft_tokens += len(fed) - 1
        self._statistics.accepted_tokens += accepted
        if text in self._places and len(fed) > 1:
            text.learn(len(fed) - 1, accepted)
            self._slots.cut(slot, len(slot.tokens))

    def _take(
        self, text: Generation, slot: Slot, logits: StepLogits, before: Sequence[int] = ()
    ) -> None:
        token = text.sequence.tokens[-1]
        text.note_fed(len(slot.tokens), [token], self._feeder.fetched, before)
        slot.tokens.append(token)
        self._hand_over(text, logits)

    def _hand_over(self, text: Generation, logits: StepLogits) -> None:
        """Let a text take its next token. What a constraint raises, too, is its own affair."""
        before = len(text.sequence.tokens)
        try:
            text.take(logits)
        except BaseException as error:
            text.fail(error)
            self._dismiss(text)
            return
        self._statistics.completion_tokens += len(text.sequence.tokens) - before
        if text.finished:
            self._statistics.note_finished(text.served_seconds)
            self._release(text)

    def _lose(self, text: Generation, error: BaseException) -> None:
        """End a text whose step failed; raises the error if no other can go on either."""
        if self._is_for_all(error):
            raise error
        if not isinstance(error, EdgeMemLLMError):
            _log.error("a step failed, and with it one reply", exc_info=error)
        text.fail(error)
        self._dismiss(text)

    def _is_for_all(self, error: BaseException) -> bool:
        """Whether an error is not one text's: the cache is lost, or the program interrupted."""
        return self._feeder.cache.closed or isinstance(error, KeyboardInterrupt)

    def _dismiss(self, text: Generation) -> None:
        self._statistics.given_up += 1
        self._release(text)

    def _release(self, text: Generation) -> None:
        self._slots.give_back(self._places.pop(text))
        for group in (self._filling, self._growing):
            if text in group:
                group.remove(text)

    def _note_reused(self, text: Generation, count: int) -> None:
        text.reused += count
        self._statistics.reused_tokens += count


def complete_texts(
    feeder: Feeder,
    context: int,
    requests: Sequence[CheckedRequest],
    records: Selection,
    tokenizer: Tokenizer,
) -> list[str]:
    """Return the text that each request asks for, all computed together, with no thread.

    The feeder's cache has a place for each. Raises what goes wrong with any of them.
    """
    feeder.cache.ensure(max(len(request.prompt) for request in requests))
    scheduler = Scheduler(feeder, context, context, EngineStatistics(), invariant=False)
    texts = [CollectedText() for _ in requests]
    for number, (request, text) in enumerate(zip(requests, texts, strict=True)):
        scheduler.admit(Generation(number, request, records, text, tokenizer))
    scheduler.complete()
    return [each.text for each in texts]
