"""Sequences of a cache change places, several of them from one: what beam search does.

Knows the operations of a cache, `copy` and `swap`; nothing of beams.
"""

from __future__ import annotations

from collections.abc import Sequence

from edge_memllm.errors import RequestError
from edge_memllm.runtime_protocol import KVCache


def reorder(cache: KVCache, sources: Sequence[int]) -> None:
    """Let sequence b hold what sequence `sources[b]` held, for every b, in place.

    A sequence that nobody needs any more is written first; what is left over are rings, in which
    places are exchanged. Raises `RequestError` where the cache cannot move what it holds.
    """
    waiting = {target: source for target, source in enumerate(sources) if target != source}
    if waiting and not cache.copies:
        raise RequestError(
            "beam search moves keys and values between sequences, which cannot be done on this "
            "device. Use num_beams=1."
        )
    while waiting:
        needed = set(waiting.values())
        free = [target for target in waiting if target not in needed]
        if free:
            for target in free:
                source = waiting.pop(target)
                cache.copy(target, source, int(cache.lengths[source]))
        else:
            _exchange(cache, waiting)


def _exchange(cache: KVCache, waiting: dict[int, int]) -> None:
    """Give one sequence of a ring what it waits for; whoever waited for it looks there now."""
    target, source = waiting.popitem()
    cache.swap(target, source)
    moved = {target: source, source: target}
    for other, place in waiting.items():
        waiting[other] = moved.get(place, place)
    for other in [each for each, place in waiting.items() if each == place]:
        del waiting[other]
