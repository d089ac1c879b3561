"""float16 without numpy's slow conversion: to float32, and the place of the largest.

Graphs give logits in float16, a vocabulary of them for every token. Their bits are worked on as
integers, which numpy does many at a time. Knows nothing of what the numbers mean.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_INFINITE = 0x7C00  # the bits of +inf; NaN lies above, in both signs
_SIGN = 0x8000
_KEPT = np.int32(-0x70002000)  # of the shifted bits: sign, exponent and fraction
_EXPONENTS_APART = np.float32(2.0**112)


def widen(halves: NDArray[Any], out: NDArray[np.float32]) -> NDArray[np.float32]:
    """Write float16 values into `out`, of the same shape, and return it. Both are contiguous."""
    bits, signed = halves.view(np.uint16), halves.view(np.int16)
    if not bits.size or signed.max() >= _INFINITE or bits.max() >= _INFINITE | _SIGN:
        np.copyto(out, halves)
        return out
    wide = out.view(np.int32)
    np.copyto(wide, signed)
    np.left_shift(wide, 13, out=wide)
    np.bitwise_and(wide, _KEPT, out=wide)
    # One product sets all exponents right, those of subnormal numbers among them. It would make
    # numbers of what is infinite or NaN, hence the way above.
    return np.multiply(out, _EXPONENTS_APART, out=out)


def place_of_largest(halves: NDArray[Any]) -> int | None:
    """Return the first place of the largest of float16 values [N], as `argmax` does.

    None if there is no telling from the bits: nothing is above zero, or not all are finite.
    """
    signed = halves.view(np.int16)
    place = int(signed.argmax())  # positive numbers are in the order of their bits
    if not 0 < signed[place] < _INFINITE or halves.view(np.uint16).max() >= _INFINITE | _SIGN:
        return None
    return place
