"""The highest values of many columns, kept while a vocabulary streams by."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float32]
Ids = NDArray[np.int64]


class Highest:
    """The `count` highest values of each of C columns, and whose they are.

    Of equal values those of the lowest ids stay, in whatever order and parts they come.
    """

    def __init__(self, count: int, columns: int) -> None:
        self._count = count
        self.values: Values = np.empty((0, columns), np.float32)  # [<= count, C], falling
        self.ids: Ids = np.empty((0, columns), np.int64)

    def add(self, ids: Ids, values: Values) -> None:
        """Take rows [N, C] of `ids` [N], none of which came before."""
        if len(ids) > self._count:  # sorting is for the few that may stay
            bound = -np.partition(-values, self._count - 1, axis=0)[self._count - 1]
            kept = (values >= bound).any(axis=1)
            ids, values = ids[kept], values[kept]
        every = np.concatenate([self.values, values])
        owners = np.concatenate([self.ids, np.broadcast_to(ids[:, None], values.shape)])
        best = np.lexsort((owners, -every), axis=0)[: self._count]
        self.values = np.take_along_axis(every, best, axis=0)
        self.ids = np.take_along_axis(owners, best, axis=0)
