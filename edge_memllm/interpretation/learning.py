"""The one way to scikit-learn, which only clusters and maps need: the extra `explain`."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from edge_memllm.errors import missing_extra


def learning(part: str) -> Any:
    """Return a module of scikit-learn, such as "cluster"; it takes a second to load.

    Raises `RuntimeUnavailableError` where it is not installed.
    """
    try:
        return import_module(f"sklearn.{part}")
    except ModuleNotFoundError as error:
        raise missing_extra("scikit-learn", "explain") from error
