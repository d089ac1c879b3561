"""One codec of a sweep: its artifact is made, everything is measured on it, it is removed.

Returns plain data for JSON; knows nothing of where results are kept.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_memllm.arrays import Doubles, Floats
from edge_memllm.artifact.layout import RecordBuffer
from edge_memllm.benchmark.machine import environment
from edge_memllm.benchmark.worker import run_trial
from edge_memllm.codecs import get_codec
from edge_memllm.evaluation import (
    Divergence,
    combine_divergences,
    mean_result,
    measure_divergence,
    measure_task,
)
from edge_memllm.evaluation.perplexity import text_tokens
from edge_memllm.loading import load
from edge_memllm.mixed_precision import target_of
from edge_memllm.model import Model
from edge_memllm.progress import Counted, Progress
from edge_memllm.sweep.plan import Plan, SweepRequest
from edge_memllm.table.source import RecordSource

_CHUNK_BYTES = 32 << 20
# The classes a token is in by how often a text has it: from these counts on.
CLASS_STARTS = (0, 1, 2, 10, 100, 1000)


_ARTIFACTS = "artifacts"
_PROMPT, _NEW, _TRIALS = 32, 64, 5


@dataclass(frozen=True, slots=True)
class LayerError:
    """The error of one layer's rows of all tokens."""

    largest: float
    rms: float
    relative_rms: float  # to the rms of the source's rows
    cosine: float  # mean over the tokens of that between both rows


@dataclass(frozen=True, slots=True)
class ClassError:
    """The error of the rows of the tokens that a text has `least` to `most` times."""

    least: int
    most: int | None  # None: without end
    tokens: int  # different ones
    rms: float
    relative_rms: float


@dataclass(frozen=True, slots=True)
class RowErrors:
    """The error of all rows: together, by layer, by class (none without a text)."""

    total: LayerError
    layers: list[LayerError]
    classes: list[ClassError]


def measure_rows(
    source: RecordSource,
    table: RecordSource,
    vocabulary: int,
    counts: NDArray[np.int64] | None = None,
    progress: Counted | None = None,
) -> RowErrors:
    """Compare the rows of two tables of one model, token by token.

    `counts` [V] says how often each token occurs in a text; None leaves the classes out.
    `progress(done, total)` is called with tokens.
    """
    layers = source.layout.layers
    largest = np.zeros(layers)
    error, power, cosine = np.zeros((3, vocabulary, layers))
    for ids, truth, rows in _chunks(source, table, vocabulary):
        found = rows - truth
        largest = np.maximum(largest, np.abs(found).max(axis=(0, 2)))
        error[ids], power[ids] = _squares(found), _squares(truth)
        cosine[ids] = _cosines((truth * rows).sum(axis=2, dtype=np.float64), power[ids], rows)
        if progress is not None:
            progress(int(ids[-1]) + 1, vocabulary)
    width = source.layout.width
    each = [
        LayerError(float(most), *_rms(error[:, i], power[:, i], width), float(cosine[:, i].mean()))
        for i, most in enumerate(largest)
    ]
    total = LayerError(float(largest.max()), *_rms(error, power, width), float(cosine.mean()))
    return RowErrors(total, each, _classes(counts, error, power, width))


def _chunks(
    source: RecordSource, table: RecordSource, vocabulary: int
) -> Iterator[tuple[NDArray[np.int64], Floats, Floats]]:
    """Yield token ids and the rows [N, L, D] of both tables."""
    layout = source.layout
    count = max(1, _CHUNK_BYTES // (4 * layout.layers * layout.width))
    buffers = [RecordBuffer(each.layout, min(count, vocabulary)) for each in (source, table)]
    for start in range(0, vocabulary, count):
        ids = np.arange(start, min(start + count, vocabulary))
        source.fetch(ids, buffers[0])
        table.fetch(ids, buffers[1])
        yield ids, buffers[0].rows(len(ids)), buffers[1].rows(len(ids))


def _squares(values: Floats) -> Doubles:
    """Doubles of squares [N, L] of values [N, L, D]."""
    return np.asarray(np.square(values).sum(axis=2, dtype=np.float64))


def _cosines(product: Doubles, power: Doubles, rows: Floats) -> Doubles:
    """Cosines [N, L]; a row of zeros agrees with nothing but a row of zeros."""
    other = _squares(rows)
    norm = np.sqrt(power * other)
    both_zero = (power == 0) & (other == 0)
    return np.where(norm > 0, product / np.where(norm > 0, norm, 1), both_zero.astype(np.float64))


def _rms(error: Doubles, power: Doubles, width: int) -> tuple[float, float]:
    """Root mean square of the error; and relative to that of the rows, 0 for rows of zeros."""
    total = float(power.sum())
    rms = float(np.sqrt(error.mean() / width))
    return rms, float(np.sqrt(error.sum() / total)) if total else 0.0


def _classes(
    counts: NDArray[np.int64] | None, error: Doubles, power: Doubles, width: int
) -> list[ClassError]:
    if counts is None:
        return []
    found = []
    for number, least in enumerate(CLASS_STARTS):
        last = number + 1 == len(CLASS_STARTS)
        most = None if last else CLASS_STARTS[number + 1] - 1
        chosen = (counts >= least) & (True if most is None else counts <= most)
        if chosen.any():
            figures = _rms(error[chosen], power[chosen], width)
            found.append(ClassError(least, most, int(chosen.sum()), *figures))
    return found


def class_name(found: dict[str, Any]) -> str:
    """Return a class as people read it: `10 to 99`."""
    least, most = found["least"], found["most"]
    if most is None:
        return f"{least:,} or more"
    return f"{least}" if least == most else f"{least} to {most}"


class Bench:
    """What all codecs are measured against, opened once: source, reference, the texts' tokens."""

    def __init__(self, plan: Plan, source: Model, reference: Model, progress: Progress) -> None:
        self._plan = plan
        self._source = source
        self._reference = reference
        self._progress = progress
        self._vocabulary = source.manifest.model.vocab_size
        self._counts = self._count_tokens() if plan.request.texts else None

    def measure(self, codec: str) -> dict[str, Any]:
        """Return the result of one codec, without its settings. Raises `ExportError`."""
        start = perf_counter()
        with self._model(codec) as model:
            found = {
                "codec": codec,
                "table": table_figures(model),
                "rows": asdict(self._rows(codec, model)),
                **self._texts(codec, model),
                **self._tasks(codec, model),
                "decode": self._decode(codec, model),
                "environment": {"device": model.device, **environment()},
            }
        return {**found, "seconds": round(perf_counter() - start, 1)}

    @contextmanager
    def _model(self, codec: str) -> Iterator[Model]:
        """The artifact with this codec, loaded; the source itself where it is stored so."""
        if codec == self._plan.source_codec:
            yield self._source
            return
        request, path = self._plan.request, artifact_path(self._plan, codec)
        self._make(codec, path)
        try:
            with open_model(path, request) as model:
                yield model
        finally:
            if not request.keep:
                remove_artifact(path)

    def _make(self, codec: str, path: Path) -> None:
        from edge_memllm_export import requantize

        request, layout = self._plan.request, self._source.manifest.layout
        target = target_of(codec)
        if target is None:
            layout = layout.with_codec(get_codec(codec))
        learns = target is not None or layout.parameters_bytes > 0
        requantize(
            self._plan.source,
            path,
            table_codec=None if target else codec,
            table_target=target,
            table_search=request.search and (target is not None or layout.searches),
            table_text=request.table_text if learns else None,
            overwrite=True,
            progress=lambda stage, done, total: self._report(codec, stage, done, total),
        )

    def _rows(self, codec: str, model: Model) -> Any:
        return measure_rows(
            self._source.source,
            model.source,
            self._vocabulary,
            self._counts,
            lambda done, total: self._report(codec, "rows", done, total),
        )

    def _texts(self, codec: str, model: Model) -> dict[str, Any]:
        parts: dict[str, Divergence] = {}
        for name, text in self._plan.request.texts.items():

            def progress(done: int, total: int, name: str = name) -> None:
                self._report(codec, name, done, total)

            windows = self._plan.windows
            parts[name] = measure_divergence(
                model, self._reference, text, **windows, progress=progress
            )
        if not parts:
            return {"text": None, "texts": {}}
        every = combine_divergences(list(parts.values()))
        return {
            "text": _text_figures(every),
            "texts": {name: _text_figures(found) for name, found in parts.items()},
        }

    def _tasks(self, codec: str, model: Model) -> dict[str, Any]:
        results = []
        for task in self._plan.request.tasks:

            def progress(done: int, total: int, name: str = task.name) -> None:
                self._report(codec, name, done, total)

            results.append(measure_task(model, task, progress))
        groups = dict.fromkeys(result.group for result in results if result.group is not None)
        means = [
            mean_result(name, [each for each in results if each.group == name]) for name in groups
        ]
        return {
            "tasks": {each.name: each.as_dict() for each in results},
            "groups": {each.name: each.as_dict() for each in means},
        }

    def _decode(self, codec: str, model: Model) -> dict[str, Any]:
        """Speed of a few short greedy texts behind one prompt, records in the page cache."""
        spec = model.manifest.model
        length = min(_PROMPT, spec.vocab_size, spec.max_position_embeddings // 4)
        new = max(2, min(_NEW, spec.max_position_embeddings // 2))
        prompt = np.random.default_rng(0).choice(spec.vocab_size, length, replace=False).tolist()
        speeds = []
        for number in range(_TRIALS + 1):  # the first one warms up
            trial = run_trial(model, prompt, new, lambda: None)
            speeds.append(trial.decode_tokens_per_second)
            self._report(codec, "decode", number + 1, _TRIALS + 1)
        kept = speeds[1:]
        return {
            "tokens_per_second": float(np.median(kept)),
            "lowest": min(kept),
            "highest": max(kept),
            "trials": len(kept),
            "new_tokens": new,
        }

    def _count_tokens(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        counts = np.zeros(self._vocabulary, np.int64)
        for text in self._plan.request.texts.values():
            fed = np.asarray(text_tokens(self._source, text).fed, np.int64)
            counts += np.bincount(fed, minlength=self._vocabulary)
        return counts

    def _report(self, codec: str, stage: str, done: int, total: int) -> None:
        self._progress(f"{codec}: {stage}", done, total)


def open_model(path: Path, request: SweepRequest) -> Model:
    """Load an artifact as all of a sweep are."""
    # A reader of its own choice would measure the storage each time, and might choose otherwise.
    return load(path, device=request.device, reader="pread", threads=request.threads)


def table_figures(model: Model) -> dict[str, Any]:
    """Return the sizes of a model's table.

    `payload_bytes` is what the codec needs: records without padding, and the parameters all share.
    `bytes_per_token` and `stride` are means where records differ in size.
    """
    manifest, layout = model.manifest, model.manifest.layout
    vocabulary = manifest.model.vocab_size
    payload = layout.payload_bytes(vocabulary)
    records = payload - layout.parameters_bytes
    rows = vocabulary * layout.layers * layout.width
    return {
        "file_bytes": manifest.files[manifest.table.file].bytes,
        "payload_bytes": payload,
        "parameters_bytes": layout.parameters_bytes,
        "bytes_per_token": round(records / vocabulary),
        "stride": round(layout.records_bytes(vocabulary) / vocabulary),
        "bits_per_value": 8 * (payload - vocabulary * layout.embedding_bytes) / rows,
    }


def artifact_path(plan: Plan, codec: str) -> Path:
    """Return where a codec's artifact is made."""
    return plan.request.out / _ARTIFACTS / codec


def remove_artifact(path: Path) -> None:
    """Remove an artifact that the sweep made, if it is there, and its folder when it is empty."""
    if path.is_dir():
        shutil.rmtree(path)
    if path.parent.is_dir() and not any(path.parent.iterdir()):
        path.parent.rmdir()


def _text_figures(found: Divergence) -> dict[str, Any]:
    figures = found.as_dict()
    del figures["tokens"]
    return {**found.model.as_dict(), **figures}
