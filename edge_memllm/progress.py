"""Whom long work tells how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # the stage, and how much is done of how much
Counted = Callable[[int, int], None]  # the same within one stage
