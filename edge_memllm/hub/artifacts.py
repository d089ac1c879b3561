"""Where an artifact is: here, or to be downloaded first.

Commands import this when they start, so what downloads is imported when it is needed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from edge_memllm.hub.names import HubModel


def artifact_folder(
    source: str | os.PathLike[str], *, revision: str | None = None, **options: Any
) -> Path:
    """Return the folder of an artifact, downloaded first when `source` names one of the Hub.

    A folder of this machine is returned as it is; `org/name` and `hf://org/name@revision` are of
    the Hub, where `revision` comes before the one in the name. `options` are those of
    `edge_memllm.hub.download.download_artifact`, and so are the errors; a `revision` of a folder
    is a `RequestError`.
    """
    model = HubModel.wanted(source, revision)
    if model is None:
        return Path(source)
    from edge_memllm.hub.download import download_artifact

    return download_artifact(model, **options)
