"""OpenAI's own description of its API, turned into requests by schemathesis: no 5xx, ever.

The document is cut to what the server has; tests/data/openai-openapi says where it comes from.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
)

from edge_memllm.server.settings import Limits
from support import DATA
from support.server import MODEL_ID, TEMPLATE, Served, serving_small
from support.small_model import write_small_artifact

DOCUMENT = DATA / "openai-openapi/openapi.completions-subset.json"
CHECKS = [not_a_server_error, response_schema_conformance, content_type_conformance]
KNOWN = {200, 400, 404, 405, 413, 415}
SCHEMA = schemathesis.openapi.from_path(DOCUMENT)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = write_small_artifact(tmp_path_factory.mktemp("artifact") / "a").path
    with serving_small(folder, template=TEMPLATE, limits=Limits(max_tokens=8)) as found:
        yield found
        found.settled()
        assert found.complete(max_tokens=1)


@SCHEMA.parametrize()
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_openai_describes_is_answered(case: schemathesis.Case, served: Served) -> None:
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = MODEL_ID  # else all that is looked at is a name nobody has
    response = case.call(base_url=f"{served.url}/v1", timeout=20)
    assert response.status_code in KNOWN
    if any(each.startswith("text/event-stream") for each in response.headers["content-type"]):
        # The description has streams of chats only, though completions can be asked for one.
        assert case.body["stream"] is True
        case.validate_response(response, checks=[not_a_server_error])
        return
    case.validate_response(response, checks=CHECKS)
    if response.status_code >= 400 and response.status_code != 405:
        error = response.json()["error"]
        assert error["message"]
        assert error["type"] == "invalid_request_error"
