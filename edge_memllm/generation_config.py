"""How an artifact wants its tokens chosen, where nobody says otherwise."""

from __future__ import annotations

from edge_memllm.artifact import Artifact
from edge_memllm.errors import ArtifactError, RequestError
from edge_memllm.sampling import Sampling
from edge_memllm.tokenization import read_json


def artifact_sampling(artifact: Artifact) -> Sampling:
    """Return what `generation_config.json` states, or greedy; raises `ArtifactError`."""
    try:
        return Sampling.from_generation_config(read_json(artifact, "generation_config.json"))
    except RequestError as error:
        where = artifact.path / "generation_config.json"
        raise ArtifactError(f"{where}: {error} Correct it and export again.") from error
