"""What analyses may ask of a memory, wherever its weights or rows lie.

`network_memory` answers from a checkpoint's weights, `features.TableMemory` from an artifact's
table, which has rows and no keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]


class Memory(Protocol):
    """M memories (`layers`) of width D for a vocabulary of V tokens; `keys` is K.

    `keys` is None where no FFN-M makes the rows, or its weights are not at hand: `coefficients`
    and `values` raise `RequestError` then.
    """

    @property
    def layers(self) -> int:
        """M, the memory rows of a token."""

    @property
    def keys(self) -> int | None:
        """K."""

    @property
    def width(self) -> int:
        """D."""

    @property
    def vocabulary(self) -> int:
        """V."""

    def embeddings(self, ids: Ids) -> Floats:
        """Return the embeddings [N, D] of distinct tokens [N]."""

    def rows(self, layer: int, ids: Ids) -> Floats:
        """Return the rows [N, D] of distinct tokens [N] in a layer, without gain."""

    def coefficients(self, layer: int, ids: Ids, keys: Sequence[int] | None = None) -> Floats:
        """Return c [N, K] of tokens [N] in a layer, or only of the keys that are named."""

    def values(self, layer: int, keys: Sequence[int] | None = None) -> Floats:
        """Return the values [K, D] of a layer, or only of the keys that are named."""
