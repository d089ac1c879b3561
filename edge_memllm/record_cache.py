"""A bounded cache of records in their stored form, for readers that have no cache of their own.

Records lie in equal slots of one piece of memory. A new one takes the place of one that was not
asked for lately (CLOCK: a hand goes round and gives each slot used since its last visit another
turn). Tokens named as hot have slots of their own and never leave. Knows bytes and token ids,
nothing of files, checksums or what a record means.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge_memllm.errors import RequestError
from edge_memllm.forking import ProcessLock
from edge_memllm.readers.reader import scatter

_FREE = -1


class RecordCache:
    """At most `capacity_bytes` of records of `record_bytes` each. Thread-safe.

    `hot_tokens`, the most frequent first, come in when they are first read and then stay; they get
    half of the slots at most. Raises `RequestError` when there is not even room for one record.
    """

    def __init__(
        self, capacity_bytes: int, record_bytes: int, hot_tokens: Sequence[int] = ()
    ) -> None:
        slots = capacity_bytes // record_bytes
        if slots < 1:
            raise RequestError(
                f"A record cache of {capacity_bytes} bytes was asked for, one record takes "
                f"{record_bytes}. Ask for more, or for 0 to have none."
            )
        self.slots = slots
        hot = list(dict.fromkeys(hot_tokens))[: slots // 2]
        self._reserved = {token: slot for slot, token in enumerate(hot)}
        self._first = self._hand = len(hot)  # the slots from here on are for everybody
        self._record_bytes = record_bytes
        # Not touched before it is filled, so memory is taken as records come in.
        self._arena = np.empty(slots * record_bytes, np.uint8).data
        self._slot_of: dict[int, int] = {}
        self._token_in = [_FREE] * slots
        self._used = bytearray(slots)  # 1: asked for since the hand was here
        self._lock = ProcessLock()

    def __contains__(self, token: int) -> bool:
        return token in self._slot_of

    def load(self, token: int, parts: Sequence[memoryview]) -> bool:
        """Copy the record of `token` into `parts`; return False when it is not here."""
        with self._lock:
            slot = self._slot_of.get(token)
            if slot is None:
                return False
            self._used[slot] = 1
            scatter(self._arena, slot * self._record_bytes, parts)
            return True

    def store(self, token: int, parts: Sequence[memoryview]) -> None:
        """Take in the record of `token`, which must be verified, in place of another if need be."""
        with self._lock:
            if (
                token in self._slot_of or not self._arena
            ):  # another thread stored it, or cleared all
                return
            slot = self._reserved.get(token)
            if slot is None:
                slot = self._free_slot()
            position = slot * self._record_bytes
            for part in parts:
                self._arena[position : position + len(part)] = part
                position += len(part)
            self._token_in[slot] = token
            self._slot_of[token] = slot

    def clear(self) -> None:
        """Forget all records and free the memory; nothing is taken in any more."""
        with self._lock:
            self._slot_of.clear()
            self._arena = memoryview(b"")

    def _free_slot(self) -> int:
        """Return the slot under the hand once its record was let go, and move the hand on."""
        # What comes in has no second turn before it is asked for again, so that a long prompt
        # does not push out what every text uses.
        while self._used[self._hand]:
            self._used[self._hand] = 0
            self._advance()
        slot = self._hand
        self._advance()
        if self._token_in[slot] != _FREE:
            del self._slot_of[self._token_in[slot]]
        return slot

    def _advance(self) -> None:
        self._hand = self._hand + 1 if self._hand + 1 < self.slots else self._first
