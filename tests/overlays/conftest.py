"""Files that earlier tests left to the collector are closed before open ones are counted."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(autouse=True, scope="module")
def earlier_files_are_closed() -> None:
    gc.collect()
