"""Whom long work tells how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # the stage, and how much is done of how much
# A stage of loading that takes minutes without a step in between: it is shown when it begins.
PACKING = "preparing the weights for this processor, once"
Counted = Callable[[int, int], None]  # the same within one stage
