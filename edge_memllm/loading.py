"""`load`: from the path of an artifact to a model, everything checked on the way.

A composition root: it may name the outer layer, and imports it only when called.
"""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack

from edge_memllm.artifact import Artifact
from edge_memllm.model import Model
from edge_memllm.request import check_positive
from edge_memllm.table import Table
from edge_memllm.tokenization import Tokenizer

_log = logging.getLogger(__name__)


def load(
    path: str | os.PathLike[str],
    *,
    device: str = "auto",
    reader: str = "auto",
    threads: int | None = None,
    prefill_chunk: int | None = None,
) -> Model:
    """Open the artifact in the folder `path` and return a model ready to generate.

    `device` is "cpu", "cuda" or "auto" (CUDA where it really works); `reader` is "pread", "ram"
    or "auto" (pread). `threads` of the graph on a CPU, None for one per physical core;
    `prefill_chunk` tokens of a prompt are computed at a time, None chooses by device. What was
    chosen is in `Model.describe()` and is logged.

    Raises `ArtifactError` for a folder that cannot be used, `RuntimeUnavailableError` for a
    device or package that is not there, `RequestError` for an option that does not exist; nothing
    is left open then.
    """
    from edge_memllm_runtimes import open_runtime

    if prefill_chunk is not None:
        check_positive("prefill_chunk", prefill_chunk)
    with ExitStack() as opened:
        artifact = opened.enter_context(Artifact.open(path))
        table = Table.open(artifact, reader)
        opened.callback(table.close)
        runtime = open_runtime(artifact, device, threads)
        opened.callback(runtime.close)
        tokenizer = Tokenizer.from_artifact(artifact)
        model = Model(artifact, table, runtime, tokenizer, prefill_chunk=prefill_chunk)
        opened.pop_all()
    _log.info("%s: %s on %s, reader %s", path, runtime.name, model.device, model.reader)
    return model
