"""Which runtime computes an artifact, and the checks that all runtimes share.

The contract itself is `edge_memllm.runtime_protocol`. Knows no library that computes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from edge_memllm.errors import RequestError, RuntimeUnavailableError
from edge_memllm.request import check_positive
from edge_memllm.runtime_protocol import KVCache, Runtime
from edge_memllm_runtimes.options import RuntimeOptions

if TYPE_CHECKING:
    from edge_memllm.artifact import Artifact

DEVICES = ("auto", "cpu", "cuda")

Cache = TypeVar("Cache", bound=KVCache)

_log = logging.getLogger(__name__)


def open_runtime(
    artifact: Artifact,
    device: str = "auto",
    threads: int | None = None,
    options: Callable[[str], RuntimeOptions] | None = None,
) -> Runtime:
    """Open ONNX Runtime on the device asked for; `auto` takes CUDA where it really works.

    `threads` is for the CPU: None takes one per physical core. `options` gives the rest for the
    device that is tried, "cpu" or "cuda"; it may refuse. The runtime's `device` says what was
    chosen. Raises `RuntimeUnavailableError` when the device is not there, never falls back from
    one that was named, and `RequestError` for an option the device does not have.
    """
    if device not in DEVICES:
        raise RequestError(f"device is {device!r}, expected one of {', '.join(DEVICES)}.")
    if threads is not None:
        check_positive("threads", threads)
    from edge_memllm_runtimes.ort import OrtRuntime
    from edge_memllm_runtimes.ort_session import require_device

    def opened(name: str) -> Runtime:
        require_device(artifact, name)
        chosen = RuntimeOptions() if options is None else options(name)
        return OrtRuntime(artifact, name, replace(chosen, threads=threads))

    if device != "auto":
        return opened(device)
    try:
        return opened("cuda")
    except RuntimeUnavailableError as error:
        _log.info("device auto: cpu, because cuda is not usable. %s", error)
    return opened("cpu")


def own_cache(cache: KVCache, kind: type[Cache]) -> Cache:
    """Return `cache` as the kind a runtime makes; raises `TypeError` if another made it."""
    if not isinstance(cache, kind):
        raise TypeError(f"a {type(cache).__name__} was given, expected the runtime's own cache.")
    return cache


def check_step(
    token_index: NDArray[np.int64],
    distinct: int,
    cache: KVCache,
    logits_index: NDArray[np.int64],
    sequence: int | range | None,
) -> None:
    """Raise `ValueError` for arrays that do not fit together, before anything is computed."""
    batch, tokens = token_index.shape
    if sequence is None:
        fits = batch == cache.batch and (tokens == 1 or batch == 1)
    elif isinstance(sequence, range):
        inside = 0 <= sequence.start < sequence.stop <= cache.batch and sequence.step == 1
        fits = inside and batch == len(sequence) and tokens == 1
    else:
        fits = batch == 1 and 0 <= sequence < cache.batch
    if not fits or tokens < 1:
        raise ValueError(
            f"token_index {token_index.shape} does not fit a cache of {cache.batch} sequences: "
            "expected [B, 1], or [1, T] with one sequence of them."
        )
    if logits_index.shape[0] != batch:
        raise ValueError(f"logits_index {logits_index.shape}, expected [{batch}, K].")
    _check_range("token_index", token_index, distinct)
    _check_range("logits_index", logits_index, tokens)


def _check_range(name: str, index: NDArray[np.int64], limit: int) -> None:
    # ONNX Runtime takes -1 for the last entry without a word.
    if index.size == 1:  # every decode step: a plain number is compared ten times as fast
        low = high = index.item()
    elif index.size:
        low, high = index.min(), index.max()
    else:
        return
    if low < 0 or high >= limit:
        raise ValueError(f"{name} goes from {low} to {high}, expected 0 to {limit - 1}.")
