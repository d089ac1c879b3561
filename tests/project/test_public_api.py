from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

import pytest

import edge_memllm
from edge_memllm.engine.request import Request
from edge_memllm.options import signature_of

PUBLIC = {
    "ArtifactError",
    "Cancellation",
    "ChatPiece",
    "ChatReply",
    "CorruptionError",
    "EdgeMemLLMError",
    "GenerationCancelledError",
    "GenerationStatistics",
    "Model",
    "Piece",
    "RequestError",
    "RuntimeUnavailableError",
    "Sampling",
    "Session",
    "StorageError",
    "__version__",
    "load",
}


def test_exactly_these_names_are_public() -> None:
    assert set(edge_memllm.__all__) == PUBLIC
    assert set(dir(edge_memllm)) == PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_can_be_imported_and_says_what_it_is(name: str) -> None:
    value = getattr(edge_memllm, name)
    assert name == "__version__" or inspect.getdoc(value)


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'edge_memllm' has no attribute 'nothing'"):
        _ = edge_memllm.nothing  # type: ignore[attr-defined]


def test_the_version_is_a_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", edge_memllm.__version__)


def test_the_public_calls_keep_their_parameters() -> None:
    """Renaming one of these breaks somebody's program: do it on purpose."""
    load = list(inspect.signature(edge_memllm.load).parameters)
    limits = ["memory_limit", "vram_limit", "cuda_graph", "packed_cache"]
    chosen = ["device", "reader", "threads", "prefill_chunk", "table_quality"]
    assert load == [
        "path",
        *chosen,
        "record_cache",
        "hot_text",
        *limits,
        "overlays",
        "export",
        "export_options",
        "progress",
        "memory_share",
    ]
    options = ["max_new_tokens", "stop", "stop_token_ids", "max_tokens", "sampling"]
    options += ["temperature", "top_p", "top_k", "min_p", "seed", "ignore_eos"]
    options += ["speculate", "overlays", "cancellation", "penalties", "constraint"]
    options += [
        "response_format",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "shown_tokens",
        "without_memory",
        "choices",
        "top",
        "top_of",
    ]
    options += ["score_prompt", "cache_prompt", "progress", "trace"]
    options += ["client", "timeout", "since"]
    model, session = edge_memllm.Model, edge_memllm.Session
    for call in (model.stream, model.generate, model.astream):
        assert list(inspect.signature(call).parameters) == ["self", "prompt", *options]
    for call in (session.stream, session.generate, session.astream):
        assert list(inspect.signature(call).parameters) == ["self", *options]


def test_the_fields_of_a_request_stand_in_one_place_with_their_defaults() -> None:
    asked = list(signature_of(Request).parameters.values())
    assert list(inspect.signature(edge_memllm.Model.stream).parameters.values())[1:] == asked
    for call in (edge_memllm.Model.stream, edge_memllm.Session.generate):
        said = inspect.getdoc(call) or ""
        assert re.findall(r"^    (\w+): [A-Z]", said, re.MULTILINE) == [
            name for name in inspect.signature(call).parameters if name != "self"
        ]
    documented = re.findall(r"^    (\w+): [A-Z]", inspect.getdoc(Request) or "", re.MULTILINE)
    assert documented == [field.name for field in dataclasses.fields(Request)]


def test_types_are_shipped() -> None:
    assert (Path(edge_memllm.__file__).parent / "py.typed").exists()
