"""A sweep from end to end: the source, each codec that has no result yet, the pages.

What was measured with the same settings is not measured again, however the last run ended.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_memllm.artifact.atomic import write_whole
from edge_memllm.artifact.folder import Artifact
from edge_memllm.artifact.manifest import MANIFEST_NAME
from edge_memllm.errors import ExportError, RequestError
from edge_memllm.progress import Progress
from edge_memllm.sweep.measuring import Bench, artifact_path, open_model, remove_artifact
from edge_memllm.sweep.plan import (
    Plan,
    ResultsFolder,
    SweepRequest,
    differences,
    make_plan,
    write_summary,
)
from edge_memllm.sweep.report import csv_text, report_page

_REFERENCE = "reference"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sweep:
    """What a run did, by codec; `summary` is what results.json holds."""

    out: Path
    measured: tuple[str, ...]
    skipped: tuple[str, ...]  # had a result
    failed: Mapping[str, str]  # could not be made, and why
    summary: dict[str, Any]


def run_sweep(request: SweepRequest, progress: Progress | None = None) -> Sweep:
    """Measure all codecs of a request into the folder `request.out`.

    A codec that cannot be made is reported and the others go on. Raises `RequestError` for a
    request that cannot be, and for results that were made with other settings, unless
    `request.redo`; `ArtifactError` for a result's file that was damaged.
    """
    report = progress or (lambda stage, done, total: None)
    folder = ResultsFolder(request.out)
    with folder.locked():
        plan = make_plan(request, _source(request, report))
        missing = [codec for codec in plan.codecs if _wanted(plan, folder, codec)]
        failed = _measure(plan, folder, missing, report) if missing else {}
        summary = _summary(plan, folder, failed)
        write_summary(request.out / "results.json", summary)
        write_whole(request.out / "results.csv", csv_text(summary))
        write_whole(request.out / "report.html", report_page(summary))
    measured = tuple(codec for codec in missing if codec not in failed)
    skipped = tuple(codec for codec in plan.codecs if codec not in missing)
    return Sweep(request.out, measured, skipped, failed, summary)


def _source(request: SweepRequest, progress: Progress) -> Path:
    """Return the source as an artifact: itself, or what its checkpoint was exported to."""
    if (request.source / MANIFEST_NAME).exists() or not request.source.is_dir():
        if request.graph_weights is not None:
            raise RequestError(
                f"{request.source} is an artifact: its graph stays as it is. Leave the graph "
                "weights out, or give the checkpoint."
            )
        return request.source
    from edge_memllm_export import export_model

    weights = request.graph_weights or "int8"
    out = request.out / _REFERENCE
    if (out / MANIFEST_NAME).exists():
        _check_reference(out, request.source, weights)
        return out
    export_model(
        request.source,
        out,
        graph_weights=weights,
        table_codec="f16",
        accept_quality_loss=True,  # what is lost by each codec is what the sweep shows
        progress=progress,
    )
    return out


def _check_reference(out: Path, checkpoint: Path, weights: str) -> None:
    from edge_memllm_export.checkpoint import Checkpoint

    with Artifact.open(out) as artifact:
        manifest = artifact.manifest
    if manifest.model.identity != Checkpoint.open(checkpoint).identity():
        raise RequestError(
            f"{out} was made from another checkpoint than {checkpoint}. Choose another folder for "
            "this sweep."
        )
    if manifest.graph.weights != weights:
        raise RequestError(
            f"{out} has graph weights {manifest.graph.weights}, {weights} were asked for. Choose "
            "another folder for this sweep."
        )


def _wanted(plan: Plan, folder: ResultsFolder, codec: str) -> bool:
    """Whether a codec is to be measured; what a killed run left of it is removed if not."""
    found = folder.read(codec)
    if found is None:
        return True
    changed = differences(found["settings"], plan.settings)
    if not changed:
        if not plan.request.keep:
            remove_artifact(artifact_path(plan, codec))
        return False
    if not plan.request.redo:
        raise RequestError(
            f"{plan.request.out}: {codec} was measured with other settings "
            f"({', '.join(changed)}). Choose another folder, or have it measured again with redo."
        )
    return True


def _measure(
    plan: Plan, folder: ResultsFolder, codecs: list[str], progress: Progress
) -> dict[str, str]:
    """Measure codecs and store each result at once; return why others could not be made."""
    request, failed = plan.request, {}
    with ExitStack() as opened:
        source = reference = opened.enter_context(open_model(plan.source, request))
        if plan.reference != plan.source:
            reference = opened.enter_context(open_model(plan.reference, request))
        bench = Bench(plan, source, reference, progress)
        for codec in codecs:
            try:
                result = bench.measure(codec)
            except ExportError as error:
                _log.warning("%s: %s", codec, error)
                failed[codec] = str(error)
                continue
            folder.write(codec, {"settings": plan.settings, **result})
    return failed


def _summary(plan: Plan, folder: ResultsFolder, failed: dict[str, str]) -> dict[str, Any]:
    """Return every result in the folder that was measured with these settings."""
    found = folder.all()
    alike = [each for each in found.values() if each["settings"] == plan.settings]
    alike.sort(key=lambda each: (-each["table"]["payload_bytes"], each["codec"]))
    with Artifact.open(plan.source) as artifact:
        manifest = artifact.manifest
    model = manifest.model
    return {
        "settings": plan.settings,
        "model": {
            "identity": model.identity,
            "layers": model.num_hidden_layers,
            "width": model.hidden_size,
            "vocabulary": model.vocab_size,
            "source_codec": plan.source_codec,
            "graph_weights": manifest.graph.weights,
        },
        "results": [
            {name: value for name, value in each.items() if name != "settings"} for each in alike
        ],
        "failed": failed,
        "left_out": sorted(name for name, each in found.items() if each not in alike),
    }
