"""The arrays that signatures name. Their shapes stand with each function that takes one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]  # of tokens, or of the keys of a memory
Floats = NDArray[np.float32]  # what tables and graphs compute with
Logits = NDArray[np.float32]  # of a vocabulary, in the last axis
Doubles = NDArray[np.float64]  # what is summed over a text: losses, divergences, energies
Bytes = NDArray[np.uint8]
Mask = NDArray[np.bool_]
