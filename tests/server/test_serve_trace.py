"""What a reply tells of its memory: each token's record, and what comes without any memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_memllm import RequestError, load
from edge_memllm.engine import Engine, Request
from edge_memllm.engine.feeding import Feeder
from edge_memllm.overlays import Edit, OverlaySpec, overlay_of
from edge_memllm.overlays.table import OverlaidTable
from edge_memllm.table.source import RecordSource
from support.checkpoints import MakeArtifact
from support.server import TEMPLATE, Served, serving, serving_small

Json = dict[str, Any]


@pytest.fixture
def served(folder: Path) -> Iterator[Served]:
    with serving_small(folder, template=TEMPLATE) as found:
        yield found


def traced(served: Served, **body: Any) -> Json:
    whole = served.complete(**{"trace": True, "ignore_eos": True, "max_tokens": 5, **body})
    return dict(whole["choices"][0]["trace"])


def origins(trace: Json) -> str:
    """The first letters: s for storage, c for cache, k for kept; S for shared."""
    letters = {"storage": "s", "cache": "c", "kept": "k", "shared": "S"}
    return "".join(letters[each["origin"]] for each in trace["records"])


def test_every_token_that_was_fed_has_its_record(served: Served) -> None:
    trace = traced(served, prompt="abca")
    ids = served.post("/tokenize", {"prompt": "abca"}).json()["tokens"]
    fed = [*ids, *trace["tokens"][:-1]]
    assert [each["token"] for each in trace["records"]] == fed
    assert [each["position"] for each in trace["records"]] == list(range(len(fed)))
    assert [each["text"] for each in trace["records"]][:4] == list("abca")
    sizes = {each["bytes"] for each in trace["records"]}
    assert sizes == {served.service.model.manifest.layout.record_bytes}
    memory = trace["memory"]
    assert memory["peak_bytes"] > memory["anon_bytes"] > 0


def test_a_record_is_read_once_in_a_step(served: Served) -> None:
    assert origins(traced(served, prompt="abca", max_tokens=1)) == "sssS"
    assert served.engine.statistics.records_read == 3


def test_a_beginning_that_was_kept_needs_no_records(served: Served) -> None:
    traced(served, prompt="abcabc", max_tokens=1)
    assert origins(traced(served, prompt="abcabd", max_tokens=2)) == "kkkkkss"


def test_bytes_read_are_those_of_all_records_from_storage(served: Served) -> None:
    with served.openai() as client:
        found = client.completions.create(
            model="small",
            prompt=["aab", "b"],
            n=2,
            max_tokens=9,
            temperature=1,
            seed=3,
            extra_body={"trace": True},
        )
    records = [each for choice in found.choices for each in choice.trace["records"]]
    read = sum(each["bytes"] for each in records if each["origin"] == "storage")
    assert read == served.engine.statistics.bytes_read


def test_parts_of_a_trace_add_up_to_the_whole(served: Served) -> None:
    asked = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 6, "ignore_eos": True}
    asked |= {"trace": True}
    *parts, _ = served.events("/v1/chat/completions", **asked)
    again = served.post("/v1/chat/completions", asked).json()["choices"][0]["trace"]
    traces = [each["choices"][0].get("trace") for each in parts]
    # The opening says whose message it is, and the end why it ends.
    assert traces[0] is traces[-1] is None
    assert [len(each["tokens"]) for each in traces[1:-1]] == [1] * 6
    for name in ("tokens", "records"):
        joined = [value for each in traces[1:-1] for value in each[name]]
        assert [_what(each) for each in joined] == [_what(each) for each in again[name]]


def test_only_who_asks_gets_a_trace(served: Served) -> None:
    assert "trace" not in served.complete(max_tokens=2)["choices"][0]
    assert "trace" in served.refusal(prompt="x", trace="yes")["message"]


def test_a_prompt_alone_has_records_too(served: Served) -> None:
    assert origins(traced(served, prompt="ab", max_tokens=0)) == "ss"
    *parts, _ = served.events(prompt="xy", max_tokens=0, trace=True)
    assert len(parts) == 1


def test_the_record_cache_is_told_from_storage(make_artifact: MakeArtifact) -> None:
    folder = make_artifact(graph_weights="fp32")
    with load(folder, threads=1, record_cache=1 << 20) as model, serving(model) as served:
        assert origins(traced(served, prompt="abab", max_tokens=1)) == "ssSS"
        assert origins(traced(served, prompt="ba", max_tokens=1)) == "cc"
        assert origins(traced(served, prompt="c", max_tokens=0)) == "s"


@pytest.mark.parametrize("codec", ["f32", "f16", "int8", "int4"])
def test_without_memory_is_a_gain_of_nothing(make_artifact: MakeArtifact, codec: str) -> None:
    """Rows that are zero give the same, bit for bit."""

    def scores(table: RecordSource, gain: list[float] | None = None) -> np.ndarray:
        with Feeder(model.runtime, table, 1, 8, memory_gain=gain) as feeder:
            return feeder.score(0, [1, 2, 3, 2, 5]).copy()

    with load(make_artifact(graph_weights="fp32", table_codec=codec), threads=1) as model:
        layers = model.manifest.model.num_hidden_layers
        spec = OverlaySpec.for_model(model.manifest, "blank")
        edits = [Edit(token, layer, "blank") for token in range(6) for layer in range(layers)]
        blanked = OverlaidTable(model.table, [overlay_of(spec, edits)], 300)
        found = scores(model.table, [0.0] * layers)
        np.testing.assert_array_equal(found, scores(blanked))
        assert np.abs(found - scores(model.table)).max() > 0.01


def test_with_and_without_memory_share_an_engine(make_artifact: MakeArtifact) -> None:
    """What is kept of one is not used for the other, and both are as if they were alone."""
    asked = {"prompt": "a text with memory", "logprobs": 0, "echo": True, "max_tokens": 6}
    with load(make_artifact(graph_weights="fp32"), threads=1) as model, serving(model) as served:
        for _ in range(2):
            whole, bare = (
                served.complete(**asked, ignore_eos=True, without_memory=off)["choices"][0]
                for off in (False, True)
            )
            assert whole["logprobs"]["token_logprobs"][1:] != bare["logprobs"]["token_logprobs"][1:]
        both = [Request(prompt="ab", max_new_tokens=6, without_memory=off) for off in (False, True)]
        alone = [[each.token for each in served.engine.submit(one)] for one in both]
        replies = [served.engine.submit(one) for one in both]
        assert [[each.token for each in reply] for reply in replies] == alone


def test_memory_that_is_not_there_cannot_be_left_out(
    served: Served, make_artifact: MakeArtifact
) -> None:
    with pytest.raises(RequestError, match="overlays are a, b: they change a memory that is off"):
        served.engine.submit(Request(prompt="x", overlays=("a", "b"), without_memory=True))
    with (
        load(make_artifact(beta=8, graph_weights="fp32"), threads=1) as model,
        Engine(model) as engine,
        pytest.raises(
            RequestError, match=r"no token memory \(dense\): there is none to do without"
        ),
    ):
        engine.submit(Request(prompt="x", without_memory=True))


def _what(value: Any) -> Any:
    """A token, or the token of a record and its place: where it came from changes."""
    return (value["position"], value["token"]) if isinstance(value, dict) else value
