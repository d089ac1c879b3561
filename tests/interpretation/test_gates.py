"""Rows that are gates: what is answered, what is left out and why, of artifact and checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import edge_memllm
from edge_memllm.cli.main import main
from edge_memllm.interpretation.curves import GAINS, memory_effects
from edge_memllm.interpretation.explaining import Questions, explain, open_subject
from edge_memllm.interpretation.findings import Explanation
from edge_memllm.interpretation.gates import BlankRows
from edge_memllm.interpretation.report import html_page
from edge_memllm.interpretation.texts import Fed, scaled_gain, without_layers
from support.checkpoints import BOS
from support.gates import LAYERS, VOCABULARY, WIDTH, export_gates, network_logits, write_gates

TEXT = "The sea runs."
CORPUS = "The river runs to the sea, and the sea runs to nobody." * 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gates(tmp_path_factory.mktemp("gates") / "checkpoint")


@pytest.fixture(scope="module")
def artifact(checkpoint: Path) -> Path:
    return export_gates(checkpoint, checkpoint.parent / "artifact")


def explained(path: Path, **questions: Any) -> Explanation:
    with open_subject(path, threads=1) as subject:
        return explain(subject, Questions(**questions), command="edge-memllm explain")


@pytest.mark.parametrize("source", ["artifact", "checkpoint"])
def test_effects_on_a_text_are_those_of_blank_rows(
    source: str, checkpoint: Path, request: pytest.FixtureRequest
) -> None:
    (found,) = explained(request.getfixturevalue(source), texts=(TEXT,)).sentences
    ids, targets = ([each.id for each in tokens] for tokens in (found.tokens, found.targets))
    assert ids[0] == BOS

    def expected(layers: list[int]) -> np.ndarray:
        def blank(rows: Any) -> None:
            rows[:, layers] = 0

        logits = torch.from_numpy(network_logits(checkpoint, ids, blank)).double()
        return logits.log_softmax(-1).numpy()[np.arange(len(ids)), targets]

    np.testing.assert_allclose(found.log_probability, expected([]), atol=1e-3)
    np.testing.assert_allclose(found.without_memory, expected(list(range(LAYERS))), atol=1e-3)
    for layer in (0, 3, LAYERS - 1):
        np.testing.assert_allclose(found.without_layer[:, layer], expected([layer]), atol=1e-3)
    assert found.direct is None


@pytest.mark.parametrize("codec", ["f16", "int8-g64", "int4-g32", "codebook4-g32"])
def test_rows_are_blank_in_every_form(codec: str, checkpoint: Path, tmp_path: Path) -> None:
    export_gates(checkpoint, tmp_path / "a", table_codec=codec)
    with edge_memllm.load(tmp_path / "a", device="cpu", threads=1) as model:
        ids = np.array([7, 3, 250])
        blank, rows = BlankRows(model.source, [1, 5]), model.source.rows(ids)
        rows[:, [1, 5]] = 0
        np.testing.assert_array_equal(blank.rows(ids), rows)
        np.testing.assert_array_equal(blank.embeddings(ids), model.source.embeddings(ids))


def test_tokens_have_lengths_and_nothing_is_read_through_the_head(artifact: Path) -> None:
    found = explained(artifact, tokens=("a",), layers=(2, 0))
    (card,) = found.tokens
    assert [use.layer for use in card.layers] == [2, 0]
    assert all(use.norm > 0 and use.promotes is use.suppresses is None for use in card.layers)
    assert found.model.memory_kind == "gate"
    assert "What rows promote is left out: a gate is multiplied with" in found.notes[0]


@pytest.mark.parametrize("source", ["artifact", "checkpoint"])
def test_tokens_are_alike_by_their_rows(
    source: str, artifact: Path, request: pytest.FixtureRequest
) -> None:
    found = explained(request.getfixturevalue(source), similar=("a",), layers=(3,), count=2)
    with edge_memllm.load(artifact, device="cpu", threads=1) as model:
        rows = model.source.rows(np.arange(VOCABULARY))[:, 3]
        (own,) = model.tokenize("a")
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = rows @ rows[own]
    cosines[own] = -2
    assert found.similar[0].features == "rows"
    assert [each.token.id for each in found.similar[0].similar] == np.argsort(-cosines)[:2].tolist()
    assert found.notes == ()


def test_clusters_compare_rows_with_embeddings_of_another_width(checkpoint: Path) -> None:
    pytest.importorskip("sklearn")
    (found,) = explained(checkpoint, clusters=True, cluster_count=8, layers=(1,)).clusters
    assert (found.features, found.tokens) == ("rows", VOCABULARY)
    assert all(each.embedding_purity > 0 for each in found.agreements)


def test_curves_leave_layers_out_by_blank_rows_and_gains_act_behind_the_norm(
    artifact: Path,
) -> None:
    found = explained(artifact, curves=True, layers=(2,), corpus=CORPUS).curves
    assert found is not None and found.dropped is not None and found.gains is not None
    with edge_memllm.load(artifact, device="cpu", threads=1) as model:
        spec = model.manifest.model
        blank = without_layers(spec.memory, model.source, [2])
        half = Fed(model.source, scaled_gain(spec, [0.5] * LAYERS))
        none = Fed(
            model.source, scaled_gain(spec, [0.0 if at == 2 else 1.0 for at in range(LAYERS)])
        )
        effects = memory_effects(model, CORPUS, [blank, half, none])
    assert found.dropped.values == (effects[0].divergence,)
    assert effects[0].divergence != pytest.approx(effects[2].divergence, rel=0.1)
    assert found.gains.groups[0].values[GAINS.index(0.5)] == effects[1].perplexity
    assert "behind the norm" in found.gains.definition
    assert found.outliers is None


def test_what_is_left_out_is_said_in_every_form(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    asked = ["explain", str(checkpoint), "--text", TEXT, "--token", "a"]
    assert main([*asked, "--html", str(page)]) == 0
    told = capsys.readouterr().out
    assert f"checkpoint, {LAYERS} layers of width 48, a gate each, {VOCABULARY} tokens" in told
    assert "promotes  " not in told
    assert main([*asked, "--json"]) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert [note.split(" ", 4)[:4] for note in notes] == [
        ["Rows", "of", "this", "model"],
        ["The", "parts", "of", "a"],
        ["What", "rows", "promote", "is"],
    ]
    written = page.read_text("utf-8").replace("&#x27;", "'").replace("&#39;", "'")
    assert all(note in told and note in written for note in notes)


def test_what_nothing_of_a_gate_answers_is_refused(
    checkpoint: Path, artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (str(checkpoint), str(artifact)):
        assert main(["explain", path, "--key", "0:1"]) == 1
        assert "no FFN-M makes them, so there are no keys" in capsys.readouterr().err
        out = tmp_path / "a.overlay.safetensors"
        assert main(["suppress", path, "--words", "a", "--out", str(out)]) == 1
        assert "Rows of this model are gates: they are multiplied with" in capsys.readouterr().err
        assert not out.exists()


def test_a_page_of_all_that_gates_answer_is_whole(artifact: Path) -> None:
    found = explained(artifact, texts=(TEXT,), tokens=("a",), similar=("a",), curves=True)
    page = html_page(found)
    assert "with a gate for each token and layer" in page
    assert "raises and lowers these next tokens" not in page
    assert found.model.width != WIDTH
