"""From samples to figures: medians, ratios, limits, and whether all outputs were the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np

from edge_memllm.benchmark.machine import BandwidthSample
from edge_memllm.benchmark.plan import Plan
from edge_memllm.benchmark.rounds import Sample, StorageReads, Worker

_RESAMPLES = 2000
_INTERVAL = (2.5, 97.5)  # per cent

SPEEDS = {
    "decode": "decode_tokens_per_second",
    "prefill": "prefill_tokens_per_second",
}
_MEDIANS = (
    "decode_tokens_per_second",
    "prefill_tokens_per_second",
    "time_to_first_token_seconds",
    "table_bytes_read_per_token",
    "reads_per_token",
    "reads_per_new_token",
    "table_share_read",
    "table_cached_share",
    "record_wait_seconds",
    "kv_bytes",
    "acceptance",
)


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio of medians, and the interval that holds it in 95 % of the resampled runs."""

    ratio: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return it as people read it: `1.04x (1.01 to 1.07)`."""
        return f"{self.ratio:.2f}x ({self.low:.2f} to {self.high:.2f})"

    @property
    def verdict(self) -> str:
        """Which side is larger, as far as the interval tells."""
        if self.low > 1:
            return "higher"
        return "lower" if self.high < 1 else "no difference seen"


def ratio_of_medians(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """Return median(above) / median(below) of figures taken in pairs, with a bootstrap interval.

    Pairs are drawn again with replacement, both sides of a pair together, so that what disturbs
    both (another program, a warmer processor) cancels out. The draws are the same every time.
    """
    if len(above) != len(below) or not above:
        raise ValueError(f"{len(above)} and {len(below)} figures, expected pairs.")
    top, bottom = np.asarray(above, float), np.asarray(below, float)
    drawn = np.random.default_rng(0).integers(0, len(top), (_RESAMPLES, len(top)))
    ratios = np.median(top[drawn], axis=1) / np.median(bottom[drawn], axis=1)
    low, high = np.percentile(ratios, _INTERVAL)
    return Ratio(float(np.median(top) / np.median(bottom)), float(low), float(high))


def quartiles(figures: Sequence[float]) -> list[float]:
    """Return the values that a quarter and three quarters of the figures lie below."""
    return [float(each) for each in np.percentile(figures, (25, 75))]


class Cell:
    """One variant at one context length: its samples by round, and the figures made of them."""

    def __init__(self, worker: Worker, samples: Sequence[Sample]) -> None:
        self.worker = worker
        self.context = samples[0].context
        self.samples = sorted(samples, key=lambda sample: sample.round)

    @property
    def name(self) -> str:
        """The variant's name."""
        return self.worker.variant.name

    def series(self, key: str) -> list[Any]:
        """One figure of every trial, by round."""
        return [sample.trial[key] for sample in self.samples]

    def figures(self, plan: Plan, weights: int, memory: dict[str, Any]) -> dict[str, Any]:
        """The medians, and what was measured how."""
        variant, loaded = self.worker.variant, self.worker.description
        return {
            "name": self.name,
            **{key: _median(self.series(key)) for key in _MEDIANS},
            "decode_quartiles": quartiles(self.series("decode_tokens_per_second")),
            "prefill_quartiles": quartiles(self.series("prefill_tokens_per_second")),
            "step_seconds": _steps(self.series("step_seconds")),
            "peak_rss_bytes": memory["peak_bytes"],  # of the process, whatever the context
            "rss_anon_bytes": _most(self.series("rss_anon_bytes")),
            "rss_file_bytes": _most(self.series("rss_file_bytes")),
            "load_seconds": loaded["load_seconds"],
            "cache": variant.cache,
            "device": loaded["device"],
            "reader": loaded["reader"],
            "runtime": loaded["runtime"],
            "threads": self.worker.threads,
            "settings": {name: _plain(value) for name, value in variant.settings.items()},
            "speculate": variant.speculate,
            "model": {name: loaded[name] for name in _MODEL if name in loaded},
            "context": self.context,
            "prompt_tokens": self.context,
            "new_tokens": plan.new_tokens,
            "roofline": self._roofline(plan, weights),
        }

    def _roofline(self, plan: Plan, weights: int) -> dict[str, Any] | None:
        """How near decoding comes to reading weights, keys and values at full bandwidth.

        A step reads every weight once, and the keys and values that it looks at of the text so far:
        of half the new tokens on average. None off the CPU: its memory says nothing about that of a
        GPU.
        """
        bandwidths = [sample.bandwidth for sample in self.samples if sample.bandwidth is not None]
        if not bandwidths:
            return None
        kv = self.worker.description["kv_read_bytes"][str(self.context)]
        moved = weights + kv
        speeds = self.series("decode_tokens_per_second")
        shares = [
            speed * moved / each.median for speed, each in zip(speeds, bandwidths, strict=True)
        ]
        best = max(each.best for each in bandwidths)
        bandwidth = median(each.median for each in bandwidths)
        return {
            "bandwidth_bytes_per_second": bandwidth,
            "best_bandwidth_bytes_per_second": best,
            "weight_bytes": weights,
            "kv_bytes": kv,
            "limit_tokens_per_second": bandwidth / moved,
            "ratio": median(shares),  # each trial to the bandwidth right before it
            "ratio_to_best": median(speeds) * moved / best,
        }


_MODEL = (
    "identity",
    "architecture",
    "beta",  # where a family has it
    "layers",
    "width",
    "vocabulary",
    "codec",
    "record_bytes",
    "graph_weights",
)


def cells_of(crew: Sequence[Worker], plan: Plan, samples: Sequence[Sample]) -> list[Cell]:
    """Group samples into cells: by context, then by worker."""
    return [
        Cell(worker, [s for s in samples if (s.worker, s.context) == (index, context)])
        for context in plan.contexts
        for index, worker in enumerate(crew)
    ]


def bandwidths(
    crew: Sequence[Worker], samples: Sequence[Sample], method: Callable[[int], str]
) -> dict[str, Any]:
    """What memory gave over the whole run, by the number of threads that read it."""
    found: dict[int, list[BandwidthSample]] = {}
    for sample in samples:
        if sample.bandwidth is not None:
            found.setdefault(crew[sample.worker].threads, []).append(sample.bandwidth)
    return {
        str(threads): {
            "bytes_per_second": median(each.median for each in all_of_them),
            "best_bytes_per_second": max(each.best for each in all_of_them),
            "method": method(threads),
        }
        for threads, all_of_them in found.items()
    }


def compared(cell: Cell, other: Cell) -> dict[str, Any]:
    """The speeds of one cell over those of another, taken in pairs of the same round."""
    return {
        name: ratio_dict(ratio_of_medians(cell.series(key), other.series(key)))
        for name, key in SPEEDS.items()
    }


def ratio_dict(ratio: Ratio) -> dict[str, Any]:
    """A ratio as plain data, with the words for it."""
    return asdict(ratio) | {"text": str(ratio), "verdict": ratio.verdict}


def identities(cells: Sequence[Cell], fingerprints: dict[str, str]) -> list[dict[str, Any]]:
    """Whether the variants that must compute the same did: tokens of all trials, and logits.

    Variants that compute differently (other weights, other threads) are not held against each
    other.
    """
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.worker.variant.computation, []).append(cell)
    found = []
    for group in groups.values():
        names = list(dict.fromkeys(cell.name for cell in group))
        logits = {fingerprints[name] for name in names}
        found.append(
            {
                "variants": names,
                "identical": len(logits) == 1 and _same_tokens(group),
                "logits_sha256": {name: fingerprints[name] for name in names},
            }
        )
    return found


def _same_tokens(group: Sequence[Cell]) -> bool:
    contexts = {cell.context for cell in group}
    series = {
        context: {tuple(cell.series("tokens")) for cell in group if cell.context == context}
        for context in contexts
    }
    return all(len(each) == 1 for each in series.values())


def reading(reads: StorageReads, index: int, prompt_bytes: float) -> dict[str, Any] | None:
    """What a worker's reader takes for one record and many, against the device's own figures.

    ``prompt_bytes`` are those of a prompt's records: the device needs at least
    ``prompt_seconds_at_device_rate`` for them.
    """
    if index not in reads.workers:
        return None
    own, device = reads.workers[index], reads.device
    rate = median(device.rates)
    return {
        "record_seconds": median(own.single_seconds),
        "record_of_device": ratio_dict(ratio_of_medians(own.single_seconds, device.single_seconds)),
        "bytes_per_second": median(own.rates),
        "rate_of_device": ratio_dict(ratio_of_medians(own.rates, device.rates)),
        "prompt_seconds_at_device_rate": prompt_bytes / rate,
    }


def _median(figures: Sequence[float | None]) -> float | None:
    known = [each for each in figures if each is not None]
    return median(known) if known else None


def _most(figures: Sequence[int | None]) -> int | None:
    return max((each for each in figures if each is not None), default=None)


def _steps(trials: Sequence[Sequence[float]]) -> dict[str, float]:
    """How long the caller waited for each token after the first, over all trials."""
    seconds = np.concatenate(trials)
    return {
        "median": float(np.median(seconds)),
        "p95": float(np.percentile(seconds, 95)),
        "most": float(seconds.max()),
    }


def _plain(value: Any) -> Any:
    """Paths and texts that were given have no place in a report."""
    return value if isinstance(value, int | None) else "given"
