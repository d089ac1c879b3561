from __future__ import annotations

from collections.abc import Iterator

import pytest

from edge_memllm.artifact.folder import Artifact
from edge_memllm.errors import RequestError
from edge_memllm.readers import reader_names
from edge_memllm.table.table import Table
from support.small_model import SmallArtifact

READERS = [name for name in reader_names() if name != "auto"]


@pytest.fixture(params=READERS)
def reader(request: pytest.FixtureRequest, small: SmallArtifact) -> str:
    """Every reader that works on this system and its temporary folder."""
    with Artifact.open(small.path) as artifact:
        try:
            Table.open(artifact, request.param).close()
        except RequestError as error:
            pytest.skip(str(error))
    return request.param


@pytest.fixture
def table(small: SmallArtifact, reader: str) -> Iterator[Table]:
    with Artifact.open(small.path) as artifact:
        table = Table.open(artifact, reader)
    yield table
    table.close()
