"""GPTQ: codes that make up for each other's rounding, judged by what a matrix is fed.

Rounding to nearest keeps every weight close. What counts is the output, and the error that one
column makes there can be taken back by the columns rounded after it. With M = X^T X / n of a
matrix's inputs X, the error of a row w is (w - v) M (w - v)^T, v being the row that codes and
scales stand for. Frantar et al., GPTQ (ICLR 2023), round the columns one by one, the largest inputs
first, each after the errors so far have been carried over to it. The carrying is written here as
feedback through a factor of M, which is the same (Chee et al., QuIP, 2023, theorem 6) and needs
no inverse. Scales are found before; M is that of `damage.Sensitivity`, which weighs each token by
how much the loss minds it.
"""

from __future__ import annotations

import numpy as np
import torch

# A share of the mean square input is added to all: calibration text does not hold all there is, and
# few tokens make up a moment that gradients weigh. 0.01 costs a seventh more divergence.
_DAMPING = 0.1
_STRIDE = 64  # columns whose errors are carried among themselves before they are to all others


class Feedback:
    """Chooses the codes of matrices that read the same inputs.

    ``moment`` is M, float32 [K, K], symmetric; rows of the matrices are filled up to a multiple of
    ``block``; ``damping`` as in `damped`.
    """

    def __init__(self, moment: np.ndarray, block: int, damping: float = _DAMPING) -> None:
        wide = _widened(damped(moment, damping), block)
        self._order = np.argsort(-wide.diagonal(), kind="stable")
        # M = U D U^T with U unit upper triangular, out of the lower factor of M turned around.
        # Each of these is as large as M, so none is kept longer than needed.
        turned = self._order[::-1]
        wide = wide[turned[:, None], turned]
        factor = torch.linalg.cholesky(torch.from_numpy(wide)).numpy()
        del wide
        roots = factor.diagonal().copy()
        factor /= roots
        self._powers = np.square(roots[::-1, None])  # D [K, 1]
        # U^T: row k takes the errors of the columns before k.
        self._carry = np.ascontiguousarray(factor[::-1, ::-1].T)

    @property
    def powers(self) -> np.ndarray:
        """D in the places of the columns, float32 [K]: what a squared error left in each costs."""
        powers = np.empty(len(self._order), np.float32)
        powers[self._order] = self._powers[:, 0]
        return powers

    def __call__(
        self,
        weight: np.ndarray,
        nearest: np.ndarray,
        scales: np.ndarray,
        bits: int,
        zeros: np.ndarray | None = None,
    ) -> np.ndarray:
        """Signed codes [n, K]; a row whose error would not shrink keeps its nearest codes.

        ``scales`` [n, blocks] are those of ``nearest`` [n, K]. ``zeros`` [n, blocks] are what
        signed codes lie below the stored ones, None for the middle.
        """
        block = len(self._order) // scales.shape[1]
        # Transposed: a column of the matrix is worked on as one run of memory.
        columns, rounded = weight.T[self._order], nearest.T[self._order]
        steps = scales.T[self._order // block]
        low = np.full_like(scales, -(2 ** (bits - 1))) if zeros is None else -1.0 * zeros
        least = low.T[self._order // block]
        codes, error = self._round(columns, steps, least, least + (2**bits - 1))
        carried = _product(self._carry, columns - rounded * steps)
        before = (self._powers * np.square(carried)).sum(axis=0)
        chosen = np.empty_like(codes)
        chosen[self._order] = np.where(error < before, codes, rounded)
        return chosen.T

    def _round(
        self, columns: np.ndarray, steps: np.ndarray, low: np.ndarray, high: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Codes [K, n] of columns [K, n] with their steps, and the error of each row [n].

        ``low`` and ``high`` [K, n] are the least and the greatest codes there are.
        """
        # The inverse of a subnormal step would be infinite; such a block is zero.
        usable = np.abs(steps) >= np.finfo(np.float32).tiny
        inverse = np.divide(1, steps, out=np.zeros_like(steps), where=usable)
        codes, missed, wanted = np.empty_like(columns), np.empty_like(columns), columns.copy()
        for start in range(0, len(columns), _STRIDE):
            stop = min(start + _STRIDE, len(columns))
            wanted[start:stop] += _product(self._carry[start:stop, :start], missed[:start])
            for k in range(start, stop):
                np.rint(wanted[k] * inverse[k], out=codes[k])
                np.clip(codes[k], low[k], high[k], out=codes[k])
                np.subtract(columns[k], codes[k] * steps[k], out=missed[k])
                wanted[k + 1 : stop] += self._carry[k + 1 : stop, k, None] * missed[k]
        return codes, (self._powers * np.square(wanted - codes * steps)).sum(axis=0)


def _product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """A product of float32 matrices, by torch: numpy's threads wait long on busy cores."""
    found: np.ndarray = (torch.from_numpy(left) @ torch.from_numpy(right)).numpy()
    return found


def damped(moment: np.ndarray, damping: float = _DAMPING) -> np.ndarray:
    """M as errors are judged by: with a little of every input, and one for those always zero.

    ``damping`` is the share of the mean square input that is added to all.
    """
    power = moment.diagonal()
    out = moment.copy()
    np.fill_diagonal(out, power + np.where(power > 0, damping * power.mean(), np.float32(1)))
    return out


def _widened(moment: np.ndarray, block: int) -> np.ndarray:
    """M with inputs added up to a whole number of blocks; their weights are zero."""
    width = len(moment)
    if width % block == 0:
        return moment
    wide = np.eye(-(-width // block) * block, dtype=np.float32)
    wide[:width, :width] = moment
    return wide
