"""The measurements: of trained runs, one function each to plain figures; and of decoding.

What is current is not measured again. Decoding is measured on artifacts with random weights, as
speed does not depend on the text, against Base (the paper's Table 6): each model in turns with it,
by `edge-memllm bench --compare`, so that what disturbs the machine disturbs both.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.paper.judging import TRAINED, Judge, opened
from benchmarks.paper.one_budget import KIND
from benchmarks.paper.runs import Run, read_runs, scaled_compute
from benchmarks.paper.store import FOLDER, Results
from edge_memllm.cli.analysis.bench import make_synthetic
from edge_memllm.evaluation.perplexity import Predictor
from edge_memllm.interpretation.texts import scaled_gain, without_layers
from edge_memllm.model import Model
from edge_memllm.modeling import parameter_counts, preset_config
from edge_memllm.sweep.measuring import table_figures

GAINS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
CODECS = ("f16", "int8", "int4", "codebook4", "int3", "codebook3", "int2", "codebook2")
RANK_CUTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
_CHARACTERS, _SWEPT_CHARACTERS = 400_000, 120_000
_ALL_TEXTS = (*TRAINED, "Wikitext-2")

Figures = dict[str, Any]


@dataclass(frozen=True)
class Measurement:
    """What is measured, on which runs, and what besides them the figures depend on."""

    name: str
    measures: Callable[[Run], bool]
    settings: Callable[[Judge], Figures]
    figures: Callable[[Run, Judge], Figures]


def perplexity(run: Run, judge: Judge) -> Figures:
    """Perplexity of every text, and the losses that the training recorded."""
    with opened(run.path, judge.threads) as model:
        texts = judge.texts(model, run, _ALL_TEXTS, _CHARACTERS)
    return {"texts": texts, **_training(run), "valid_loss": run.training.get("valid_loss")}


def gain(run: Run, judge: Judge) -> Figures:
    """All feed-forward outputs scaled by one factor: texts and tasks at each (Table 1, Fig. 7)."""
    found = []
    for factor in GAINS:
        with _scaled(run, judge, [factor] * run.config.num_hidden_layers) as (model, scaled):
            texts = judge.texts(model, run, TRAINED, _SWEPT_CHARACTERS, scaled)
            found.append({"gain": factor, "texts": texts, "tasks": judge.tasks(model, scaled)})
    return {"gains": found}


def drop(run: Run, judge: Judge) -> Figures:
    """One layer's memory left out at a time, of Base its FFN (Figs. 4 and 12)."""
    layers = range(run.config.num_hidden_layers)
    with opened(run.path, judge.threads) as model:
        whole = judge.texts(model, run, TRAINED, _SWEPT_CHARACTERS)
        if run.config.has_memory:
            spec = model.manifest.model
            dropped = [without_layers(spec.memory, model.source, [layer]).gain for layer in layers]
            found = [judge.texts(model, run, TRAINED, _SWEPT_CHARACTERS, each) for each in dropped]
            return {"part": "memory", "whole": whole, "layers": found}
    found = []
    for dropped_layer in layers:
        factors = [float(layer != dropped_layer) for layer in layers]
        with _scaled(run, judge, factors) as (model, scaled):
            found.append(judge.texts(model, run, TRAINED, _SWEPT_CHARACTERS, scaled))
    return {"part": "compute", "whole": whole, "layers": found}


def bits(run: Run, judge: Judge) -> Figures:
    """The table in fewer bits, the graph exact (Table 7)."""
    return {"codecs": {word: _stored(run, judge, word) for word in ("f32", *CODECS)}}


def rank(run: Run, judge: Judge) -> Figures:
    """The table by a low-rank basis for each layer, and how its singular values fall (Table 8)."""
    width, vocabulary = run.config.hidden_size, run.config.vocab_size
    cuts = []
    for cut in RANK_CUTS:
        kept = round(width * (1 - cut))
        # Without a cut the paper stores the table itself.
        values = kept * (vocabulary + width) if cut else vocabulary * width
        word = f"lowrank-r{kept}-f16" if cut else "f16"
        size = {"cut": cut, "rank": kept, "values_per_layer": values}
        cuts.append({**size, **_stored(run, judge, word)})
    with opened(run.path, judge.threads) as model:
        return {"cuts": cuts, "singular_values": _singular_values(model)}


@contextmanager
def _scaled(
    run: Run, judge: Judge, factors: Sequence[float]
) -> Iterator[tuple[Predictor, list[float] | None]]:
    """Give a run's model and the gains for one factor per layer on all feed-forward outputs."""
    with ExitStack() as opening:
        path = run.path
        if run.config.has_compute:
            path = opening.enter_context(scaled_compute(path, factors))
        model = opening.enter_context(opened(path, judge.threads))
        yield model, scaled_gain(model.manifest.model, factors) if run.config.has_memory else None


def _stored(run: Run, judge: Judge, word: str) -> Figures:
    with opened(run.path, judge.threads, word) as model:
        return {
            "id": model.manifest.table.codec,
            "bits_per_value": table_figures(model)["bits_per_value"],
            "texts": judge.texts(model, run, TRAINED, _SWEPT_CHARACTERS),
        }


def _singular_values(model: Model) -> list[list[float]]:
    """Of each layer's rows of all tokens: relative to the largest one, the largest first."""
    rows = model.source.rows(np.arange(model.manifest.model.vocab_size))
    found = []
    for layer in rows.transpose(1, 0, 2):
        values = np.linalg.svd(layer.astype(np.float64), compute_uv=False)
        found.append([float(f"{value:.4g}") for value in values / values[0]])
    return found


def documents(run: Run, judge: Judge) -> Figures:
    """Nats of every held-out document, of all of the text; and the losses of the training."""
    with opened(run.path, judge.threads) as model:
        found = judge.documents(model, run, TRAINED)
    return {"documents": found, **_training(run)}


def _training(run: Run) -> Figures:
    """What the training recorded."""
    settings = run.training["recipe"]["training"]
    history = [each for each in run.training["history"] if "loss" in each]
    return {
        "training": {
            "tokens": [each["tokens"] for each in history],
            "loss": [round(each["loss"], 4) for each in history],
            "settings": {name: settings[name] for name in ("steps", "warmup_steps")},
        },
        "tokens_seen": run.training["tokens_seen"],
    }


def _texts(judge: Judge, *, tasks: bool = False) -> Figures:
    return judge.settings(TRAINED, _SWEPT_CHARACTERS, tasks=tasks)


def _first_seed_of(*variants: str) -> Callable[[Run], bool]:
    return lambda run: run.seed == 1 and run.variant in variants


_MEMORY = ("flex-3", "flex-2", "flex-1", "memoryllm")
MEASUREMENTS = (
    Measurement(
        "perplexity",
        lambda run: not run.variant.endswith(KIND),
        lambda judge: judge.settings(_ALL_TEXTS, _CHARACTERS, tasks=False),
        perplexity,
    ),
    Measurement(
        "documents",
        lambda run: run.variant.endswith(KIND),
        lambda judge: judge.settings(TRAINED, None, tasks=False),
        documents,
    ),
    Measurement("drop", _first_seed_of("base", *_MEMORY), _texts, drop),
    Measurement(
        "bits",
        _first_seed_of("flex-3", "memoryllm"),
        lambda judge: _texts(judge) | {"codecs": list(CODECS)},
        bits,
    ),
    Measurement(
        "rank",
        _first_seed_of("flex-3", "memoryllm"),
        lambda judge: _texts(judge) | {"cuts": list(RANK_CUTS)},
        rank,
    ),
    Measurement(
        "gain",
        _first_seed_of("base", "flex-3", "memoryllm"),
        lambda judge: _texts(judge, tasks=True) | {"gains": list(GAINS)},
        gain,
    ),
)


def measure_runs(
    folder: Path, judge: Judge, only: Sequence[str] = (), results: Path = FOLDER
) -> Iterator[str]:
    """Measure and store; yield a line for each entry that was made. `only` names measurements."""
    for measurement in MEASUREMENTS:
        if only and measurement.name not in only:
            continue
        for run in read_runs(folder):
            if measurement.measures(run):
                yield from _measure_run(measurement, run, judge, Results(measurement.name, results))


def _measure_run(
    measurement: Measurement, run: Run, judge: Judge, results: Results
) -> Iterator[str]:
    key = {"digest": run.digest(), "settings": measurement.settings(judge)}
    if results.is_current(run.name, key):
        return
    start = perf_counter()
    figures = measurement.figures(run, judge)
    seconds = round(perf_counter() - start, 1)
    about = {"variant": run.variant, "seed": run.seed, "model": run.facts()}
    results.put(run.name, {**about, **key, "seconds": seconds, "figures": figures})
    yield f"{measurement.name}: {run.name}, {seconds:.0f} s"


BETAS = {"base": 8, "flex-3": 3, "flex-2": 2, "flex-1": 1, "memoryllm": 0}
_KEPT = (
    "decode_tokens_per_second",
    "decode_quartiles",
    "prefill_tokens_per_second",
    "rss_anon_bytes",
    "rss_file_bytes",
    "table_bytes_read_per_token",
    "reads_per_token",
    "cache",
    "reader",
    "threads",
    "context",
    "new_tokens",
    "model",
    "roofline",
)


def measure_decoding(
    preset: str, artifacts: Path, options: list[str], results: Path = FOLDER
) -> Iterator[str]:
    """Make the artifacts that are missing, compare each with Base, store; yield what was done.

    `options` are further words for `edge-memllm bench`.
    """
    paths = {name: artifacts / f"{preset}-{name}" for name in BETAS}
    for name, path in paths.items():
        if not path.exists():
            make_synthetic(preset, BETAS[name], path)
            yield f"made {path}"
    for name, path in paths.items():
        if name != "base":
            report = _bench(paths["base"], path, options)
            Results("decode", results).put(f"{preset}-{name}", _entry(preset, name, report))
            yield f"compared {name} with base"


def _bench(base: Path, other: Path, options: list[str]) -> dict[str, Any]:
    """B is Base, so the ratio is that of the other model to it."""
    words = ["bench", "--compare", str(other), str(base), "--json", *options]
    command = [sys.executable, "-m", "edge_memllm.cli.main", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def _entry(preset: str, name: str, report: dict[str, Any]) -> dict[str, Any]:
    cells = {cell["name"][0]: cell for cell in report["variants"]}
    config = preset_config(preset, BETAS[name])
    return {
        "preset": preset,
        "variant": name,
        "parameters": parameter_counts(config),
        "figures": {
            "model": {key: cells["A"][key] for key in _KEPT},
            "base": {key: cells["B"][key] for key in _KEPT},
            "ratios": report["comparisons"],
            "repeats": report["repeats"],
            "environment": report["environment"],
        },
    }
