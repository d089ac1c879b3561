"""Measuring an artifact: timed trials with the table's cache in a known state, and the roofline.

Says what was measured as plain data; knows nothing of options or printing. Every trial decodes a
fixed number of tokens, whatever the model says, from a prompt of distinct tokens: a prompt that
repeats itself would find its records in memory and flatter the storage.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_memllm import __version__
from edge_memllm.errors import RequestError, RuntimeUnavailableError
from edge_memllm.sampling import Sampling

if TYPE_CHECKING:
    from edge_memllm.manifest import Manifest
    from edge_memllm.model import Model

_BANDWIDTH_BYTES = 256 << 20  # far beyond any cache
_BANDWIDTH_REPEATS = 5


@dataclass(frozen=True, slots=True)
class Plan:
    """What each trial does."""

    prompt_tokens: int
    new_tokens: int
    repeats: int
    seed: int


@dataclass(frozen=True, slots=True)
class Trial:
    """What one trial took."""

    time_to_first_token_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    table_bytes_read_per_token: float
    reads_per_token: float


def prompts(plan: Plan, manifest: Manifest) -> list[list[int]]:
    """One prompt of distinct token ids per trial. Raises `RequestError` when it cannot be done."""
    model = manifest.model
    if plan.prompt_tokens > model.vocab_size:
        raise RequestError(
            f"A prompt of {plan.prompt_tokens} distinct tokens was asked for, the vocabulary has "
            f"{model.vocab_size}."
        )
    if plan.prompt_tokens + plan.new_tokens > model.max_position_embeddings:
        raise RequestError(
            f"{plan.prompt_tokens} prompt and {plan.new_tokens} new tokens were asked for, the "
            f"model's context holds {model.max_position_embeddings}."
        )
    random = np.random.default_rng(plan.seed)
    return [
        random.choice(model.vocab_size, plan.prompt_tokens, replace=False).tolist()
        for _ in range(plan.repeats)
    ]


def run_trial(
    model: Model, prompt: list[int], new_tokens: int, before_step: Callable[[], None]
) -> Trial:
    """Prefill ``prompt`` and decode; ``before_step`` runs before each step, off the clock."""
    before_step()
    pieces = model.stream(
        prompt, max_new_tokens=new_tokens, sampling=Sampling(), seed=0, ignore_eos=True
    )
    for piece in pieces:
        last = piece
        before_step()
    statistics = last.statistics
    assert statistics is not None
    assert statistics.prefill_tokens_per_second is not None
    assert statistics.decode_tokens_per_second is not None
    return Trial(
        time_to_first_token_seconds=statistics.time_to_first_token_seconds,
        prefill_tokens_per_second=statistics.prefill_tokens_per_second,
        decode_tokens_per_second=statistics.decode_tokens_per_second,
        table_bytes_read_per_token=statistics.table_bytes_read_per_token,
        reads_per_token=statistics.reads_per_token,
    )


def medians(trials: list[Trial]) -> dict[str, float]:
    """The median of each figure over the trials."""
    return {name: median(getattr(trial, name) for trial in trials) for name in Trial.__slots__}


@contextmanager
def evictor(path: Path) -> Iterator[Callable[[], None]]:
    """Yield a function that drops the pages of the file at ``path`` from the page cache.

    Raises `RuntimeUnavailableError` where the system cannot do that. A disk or a hypervisor may
    keep a cache of its own behind the system's.
    """
    if not hasattr(os, "posix_fadvise"):
        raise RuntimeUnavailableError(
            f"--cache cold needs posix_fadvise, which {platform.system()} does not have. "
            "Measure with --cache warm or resident, or on Linux."
        )
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)  # pages that are not yet written cannot be dropped
        yield lambda: os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


def read_bandwidth(threads: int) -> float:
    """Bytes per second at which ``threads`` threads read memory: the best of a few passes."""
    array = np.ones(_BANDWIDTH_BYTES // 8, np.uint64)
    parts = np.array_split(array, threads)
    with ThreadPoolExecutor(threads) as pool:
        best = min(_timed(pool, parts) for _ in range(_BANDWIDTH_REPEATS))
    return array.nbytes / best


def _timed(pool: ThreadPoolExecutor, parts: list[Any]) -> float:
    start = perf_counter()
    list(pool.map(np.max, parts))
    return perf_counter() - start


def roofline(
    manifest: Manifest, graph_bytes: int, plan: Plan, speed: float, threads: int
) -> dict[str, float]:
    """How near ``speed`` (tokens/s) comes to reading weights, keys and values at full bandwidth.

    Each token reads every weight of the graph once, and the keys and values of the text so far:
    of half the new tokens on average.
    """
    model = manifest.model
    value_bytes = 2 if manifest.graph.compute_dtype == "float16" else 4
    position = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim
    kv_bytes = position * value_bytes * (plan.prompt_tokens + plan.new_tokens // 2)
    bandwidth = read_bandwidth(threads)
    limit = bandwidth / (graph_bytes + kv_bytes)
    return {
        "bandwidth_bytes_per_second": bandwidth,
        "limit_tokens_per_second": limit,
        "ratio": speed / limit,
    }


def environment(runtime: str, threads: int) -> dict[str, Any]:
    """Where this was measured: processor, system and versions, without names or paths."""
    return {
        "processor": _processor(),
        "logical_cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "runtime": runtime,
        "threads": threads,
        "edge_memllm": __version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
