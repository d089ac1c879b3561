"""A family with rows narrower than the stream and caches of two shapes, from export to tokens.

Nothing outside of its own file knows it: see `support.gated_family`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edge_memllm
from edge_memllm import Sampling
from edge_memllm.artifact.folder import Artifact
from edge_memllm.artifact.model_spec import CacheSpec, MemorySpec
from edge_memllm.cli.main import main
from edge_memllm.engine.feeding import Feeder
from edge_memllm.errors import ArtifactError
from edge_memllm.memory_plan import position_bytes
from edge_memllm_export import export_model, requantize, verify_against
from edge_memllm_export.architectures import ARCHITECTURES
from edge_memllm_export.checkpoint import Checkpoint
from support.gated_family import GAIN, MODEL_TYPE, ROW, SHAPES, WIDTH, Gated, write_gated
from support.graphs import change_graph

TEXT = "Gates open and close as the tokens tell them, one layer after the other. " * 5
FORMS: list[dict[str, Any]] = [
    {"graph_weights": "fp32", "table_codec": "f32"},
    {"graph_weights": "fp32", "table_codec": "int8-g32"},
    {"graph_weights": "fp16", "table_codec": "int4-g32"},
    {"graph_weights": "int8", "table_codec": "int8-g32", "kv_dtype": "int8"},
    {"graph_weights": "int4", "table_codec": "codebook4-g32"},
]


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(ARCHITECTURES, MODEL_TYPE, Gated)
    return write_gated(tmp_path / "checkpoint")


@pytest.fixture
def artifact(checkpoint: Path, tmp_path: Path) -> Path:
    return exported(checkpoint, tmp_path / "artifact", **FORMS[1])


def exported(checkpoint: Path, out: Path, **form: Any) -> Path:
    export_model(checkpoint, out, accept_quality_loss=True, **form)
    return out


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_it_climbs_the_ladder(checkpoint: Path, tmp_path: Path, form: dict[str, Any]) -> None:
    out = exported(checkpoint, tmp_path / "artifact", **form)
    rungs = verify_against(out, checkpoint)
    assert [rung for rung in rungs if not rung.ok] == []
    with Artifact.open(out) as opened:
        model, layout = opened.manifest.model, opened.manifest.layout
        size = position_bytes(opened.manifest)
    assert model.architecture == MODEL_TYPE
    assert model.memory == MemorySpec(2, ROW, "gate", GAIN)
    assert model.caches == (CacheSpec(0, 2, 16), CacheSpec(1, 1, 32, 8))
    assert (layout.embedding_width, layout.width) == (WIDTH, ROW)
    width = {"fp32": 4, "fp16": 2, "int4": 2}.get(form["graph_weights"], 1)
    assert size == sum(2 * each.kv_heads * each.head_dim for each in SHAPES) * width


def test_greedy_tokens_are_those_of_the_network(checkpoint: Path, artifact: Path) -> None:
    reference = Checkpoint.open(checkpoint).architecture.reference()
    with edge_memllm.load(artifact, threads=1) as model:
        prompt = model.tokenizer.encode(TEXT)[:300]  # beyond the first room of a cache
        pieces = model.stream(
            prompt, max_new_tokens=20, sampling=Sampling(temperature=0.0), ignore_eos=True
        )
        found = [piece.token for piece in pieces]
        with Feeder(reference.runtime(), model.table, 1, 64) as feeder:
            logits = feeder.prefill(0, prompt)
            expected = []
            for _ in range(20):
                expected.append(int(np.argmax(logits)))
                logits = feeder.prefill(0, expected[-1:])
    assert found == expected


def test_sessions_go_on_where_they_were(artifact: Path, tmp_path: Path) -> None:
    greedy = Sampling(temperature=0.0)
    with edge_memllm.load(artifact, threads=1) as model:
        with model.session(sampling=greedy) as session:
            session.append(TEXT)
            session.save(tmp_path / "text.session")
            whole = session.generate(max_new_tokens=12, ignore_eos=True)
        with model.restore_session(tmp_path / "text.session") as session:
            assert session.generate(max_new_tokens=12, ignore_eos=True) == whole


def test_several_texts_at_once_are_each_as_alone(artifact: Path) -> None:
    with edge_memllm.load(artifact, threads=1) as model:
        prompts = [TEXT[:40], TEXT[40:50], "x"]
        options: dict[str, Any] = {"max_new_tokens": 8, "ignore_eos": True}
        alone = [model.generate(prompt, **options) for prompt in prompts]
        assert model.generate(prompts, **options) == alone


def test_its_table_can_have_another_codec(artifact: Path, tmp_path: Path) -> None:
    report = requantize(artifact, tmp_path / "other", table_codec="f16")
    assert report.graph_rewired
    assert report.mean_kl < 1e-3


def test_inspection_shows_what_the_family_says(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(artifact)]) == 0
    shown = capsys.readouterr().out
    assert "gated_test, layers_with_windows 1, odd True: the table holds a gate of 32" in shown
    assert "4 heads of 16 sharing 2 keys or 4 heads of 32 sharing 1 key" in shown


def test_a_window_other_than_the_manifest_says_is_refused(artifact: Path) -> None:
    def widen(model: Any) -> None:
        for node in model.graph.node:
            for attribute in node.attribute:
                if attribute.name == "local_window_size":
                    attribute.i = 9

    change_graph(artifact, widen)
    with pytest.raises(ArtifactError, match=r"has a window of \[9, 9\], expected \[8, 8\]"):
        edge_memllm.load(artifact, threads=1)


def test_a_family_that_is_not_known_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    ARCHITECTURES.pop(MODEL_TYPE)
    with pytest.raises(
        edge_memllm.errors.ExportError, match="model_type is 'gated_test', expected"
    ):
        export_model(checkpoint, tmp_path / "out")
