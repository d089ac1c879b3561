"""Three exported models, graphs and all, in one server whose memory limit holds two of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks.over_http.program import serving
from benchmarks.over_http.several_models import measure, parse
from edge_memllm.loading import plan_loading
from edge_memllm.memory_plan import BASE_BYTES
from edge_memllm_export import export_model
from support.checkpoints import write_dense

TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
SLOTS = 4
FORMS = {"a": "int4", "b": "int8", "c": "int8"}
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads memory by /proc"
)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three models that chat, of some ten MB each."""
    home = tmp_path_factory.mktemp("models")
    shape = {"hidden_size": 256, "intermediate_size": 4096, "max_position_embeddings": 256}
    checkpoint = write_dense(home / "checkpoint", "llama", **shape)
    (checkpoint / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    made = []
    for name, form in FORMS.items():
        export_model(checkpoint, home / name, graph_weights=form, graph_method="rtn", verify=False)
        made.append(home / name)
    shutil.rmtree(checkpoint)
    return made


def test_a_hundred_requests_where_two_of_three_fit(artifacts: list[Path]) -> None:
    plans = [plan_loading(each) for each in artifacts]
    needed = [plan.model_bytes + plan.first_bytes(manifest, SLOTS) for manifest, plan in plans]
    # One is there while the largest is loaded, and for all three there is no room.
    room = max(needed) + max(plan.loading_bytes for _, plan in plans)
    assert max(needed) < room < sum(needed)
    limit = BASE_BYTES + room
    # Texts together are rounded as they are alone, so that replies can be compared to the bit.
    words = ["--slots", str(SLOTS), "--threads", "1", "--batch-invariant"]
    wish, _ = parse([*map(str, artifacts), "--memory-limit", str(limit), "--tokens", "8"])
    with serving(artifacts, ["--memory-limit", str(limit), *words]) as program:
        found = measure(program, [each.name for each in artifacts], wish)
    assert found.failures == []
    assert found.different == 0
    assert found.requests == sum(found.by_model.values()) == 100
    assert found.loads > 3
    assert found.most_loaded == 2
    assert max(needed) < found.models_bytes <= found.models_limit_bytes <= room
    assert found.own_bytes <= found.limit_bytes
