"""The processes of a measurement: what they answer, how they rest, and what becomes of the dead."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest

from edge_memllm.benchmark import rounds as crew
from edge_memllm.benchmark import worker
from edge_memllm.benchmark.plan import Plan, Variant
from edge_memllm.errors import EdgeMemLLMError, RequestError
from support.checkpoints import MakeArtifact

PLAN = Plan(contexts=(6,), new_tokens=3, repeats=2, seed=5)


def requests(variant: Variant, plan: Plan, *commands: dict[str, Any]) -> list[str]:
    first = {"variant": variant.as_dict(), "plan": {**vars_of(plan)}}
    return [json.dumps(each) for each in (first, *commands)]


def vars_of(plan: Plan) -> dict[str, Any]:
    return {name: getattr(plan, name) for name in plan.__slots__}


def test_a_worker_measures_what_it_is_asked(make_artifact: MakeArtifact) -> None:
    variant = Variant("v", make_artifact(), "warm", "pread", {"threads": 1})
    measure = {"command": "measure", "context": 6, "number": 0}
    replies: list[dict[str, Any]] = []
    worker.serve(
        requests(
            variant,
            PLAN,
            measure,
            measure,
            measure | {"number": 1},
            {"command": "fingerprint"},
            {"command": "fingerprint"},
            {"command": "read", "singles": [1, 2], "batch": [3, 4, 5]},
            {"command": "memory"},
        ),
        replies.append,
    )
    loaded, first, again, other, mark, same, reads, memory = (reply["done"] for reply in replies)
    assert (loaded["device"], loaded["reader"]) == ("cpu", "pread")
    assert loaded["kv_read_bytes"]["6"] == 2 * 2 * 64 * 2 * (6 + PLAN.new_tokens // 2)
    assert len(first["step_seconds"]) == 2
    assert first["reads_per_new_token"] == 1
    assert first["tokens"] == again["tokens"]
    assert first["tokens"] != other["tokens"]
    assert mark == same
    assert len(reads["single_seconds"]) == 2
    assert reads["batch_bytes"] == 3 * loaded["record_bytes"]
    assert memory["peak_bytes"] > 0


def test_a_worker_tells_errors(tmp_path: Path) -> None:
    variant = Variant("v", tmp_path / "none", "warm", "pread")
    replies: list[dict[str, Any]] = []
    worker.serve(requests(variant, PLAN), replies.append)
    assert replies[0]["error"] == "ArtifactError"
    assert "does not exist" in replies[0]["message"]


def test_a_worker_rests_until_its_threads_do(monkeypatch: pytest.MonkeyPatch) -> None:
    used = iter([0.0, 0.02, 0.02, 0.04, 0.04, 0.04])
    naps: list[float] = []
    monkeypatch.setattr(time, "process_time", lambda: next(used))
    monkeypatch.setattr(time, "sleep", naps.append)
    worker.rest()
    assert len(naps) == 3


class DeadProcess:
    """A process whose pipes are at their end."""

    def __init__(self, code: int) -> None:
        self.stdin, self.stdout = io.StringIO(), io.StringIO()
        self.code = code

    def wait(self, _: float | None = None) -> int:
        return self.code

    def kill(self) -> None:
        """It is dead."""


@pytest.mark.parametrize(
    ("code", "message"), [(-9, "code -9. Memory may have run out"), (1, "It said why above")]
)
def test_a_worker_that_dies_is_named(
    code: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew.subprocess, "Popen", lambda *_, **__: DeadProcess(code))
    with pytest.raises(EdgeMemLLMError, match=f"measures 'resident' ended with.*{message}"):
        crew.Worker(Variant("resident", Path("x"), "resident", "ram"), PLAN)


def test_a_worker_of_another_process(make_artifact: MakeArtifact) -> None:
    variant = Variant("v", make_artifact(), "warm", "pread", {"threads": 1})
    with crew.Worker(variant, PLAN) as process:
        assert process.threads == 1
        assert process.ask("measure", context=6, number=0)["reads_per_new_token"] == 1
        with pytest.raises(RequestError, match="Token id 300 is not in the vocabulary"):
            process.ask("read", singles=[300], batch=[1])
