from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edge_memllm.huggingface.generating import reorder


class Places:
    """A cache whose sequences hold their own first name and length."""

    copies = True

    def __init__(self, count: int) -> None:
        self.held = list(range(count))
        self.lengths = np.arange(count) + 10
        self.moves = 0

    def copy(self, sequence: int, source: int, length: int) -> None:
        assert length == self.lengths[source]
        self.held[sequence], self.lengths[sequence] = self.held[source], length
        self.moves += 1

    def swap(self, first: int, second: int) -> None:
        assert first != second
        self.held[first], self.held[second] = self.held[second], self.held[first]
        self.lengths[[first, second]] = self.lengths[[second, first]]
        self.moves += 1


@given(
    st.integers(1, 8).flatmap(
        lambda count: st.lists(st.integers(0, count - 1), min_size=count, max_size=count)
    )
)
def test_every_sequence_gets_what_it_is_to_hold(sources: list[int]) -> None:
    cache = Places(len(sources))
    reorder(cache, sources)  # type: ignore[arg-type]
    assert cache.held == sources
    assert cache.lengths.tolist() == [source + 10 for source in sources]
    assert cache.moves <= sum(target != source for target, source in enumerate(sources))
