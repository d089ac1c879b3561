from __future__ import annotations

from collections.abc import Iterator

import pytest

from edge_memllm.server.service import Service
from support.server import reading


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with reading(tmp_path_factory.mktemp("reading")) as found:
        yield found
