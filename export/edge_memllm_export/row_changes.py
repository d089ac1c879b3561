"""What training changed in the memory of a checkpoint, as an overlay for exports of the other one.

All weights but those that rows are made of must be equal, bit for bit. Rows are computed by both
networks in chunks and compared; only those that differ are stored.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from edge_memllm.errors import ExportError
from edge_memllm.overlays import OverlaySpec, OverlayWriter
from edge_memllm.overlays.making import Difference, differs
from edge_memllm.progress import Progress
from edge_memllm_export.checkpoint import Checkpoint

_DIFFER_AT_WILL = ("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache")


def checkpoint_difference(
    base: Path,
    changed: Path,
    out: str | os.PathLike[str],
    *,
    name: str,
    description: str = "",
    codec: str = "f16",
    tolerance: float = 0.0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Difference:
    """Write an overlay that makes the rows of exports of `base` those of `changed`.

    A row is stored when the norm of its difference is above `tolerance` times that of the base
    row. Raises `ExportError` for folders that are no checkpoints, and naming the first thing that
    differs besides rows; `RequestError` as `OverlayWriter`.
    """
    ours, theirs = Checkpoint.open(base), Checkpoint.open(changed)
    _check_same_but_rows(ours, theirs)
    model = ours.spec
    memory = model.memory
    if not memory.layers:
        raise ExportError(f"{base}: a model without token memory (dense) has no rows to compare.")
    spec = OverlaySpec(name, ours.identity(), memory.layers, memory.width, codec, description)
    start = 0
    with OverlayWriter(out, spec, overwrite=overwrite) as writer:
        every = np.arange(model.vocab_size)
        parts = (each.architecture.reference().rows().chunks(every) for each in (ours, theirs))
        for (_, before), (_, after) in zip(*parts, strict=True):
            at, layers = np.nonzero(differs(before, after, tolerance))
            writer.replace(start + at, layers, after[at, layers])
            start += len(after)
            if progress is not None:
                progress("comparing", start, model.vocab_size)
        return Difference(writer.finish(), model.vocab_size * memory.layers)


def _check_same_but_rows(base: Checkpoint, changed: Checkpoint) -> None:
    ours, theirs = (_fields(each) for each in (base, changed))
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            raise ExportError(
                f"{changed.path}: {key} is {theirs.get(key)}, that of {base.path} is "
                f"{ours.get(key)}. Overlays change memory rows only."
            )
    for weight in base.weight_names:
        if not base.architecture.makes_rows(weight) and not _equal(base, changed, weight):
            raise ExportError(
                f"{changed.path}: {weight} is not that of {base.path}, and overlays change memory "
                "rows only. Train the rows alone, or the FFN-M that makes them."
            )


def _fields(checkpoint: Checkpoint) -> dict[str, object]:
    fields = checkpoint.architecture.fields
    return {key: value for key, value in fields.items() if key not in _DIFFER_AT_WILL}


def _equal(base: Checkpoint, changed: Checkpoint, weight: str) -> bool:
    ours, theirs = base.array(weight), changed.array(weight)
    return ours.dtype == theirs.dtype and np.array_equal(ours.view(np.uint8), theirs.view(np.uint8))
