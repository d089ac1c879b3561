"""A model with overlays: loaded, switched for one generation, removed; over a real graph too."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edge_memllm
from edge_memllm import Model, RequestError, Sampling
from edge_memllm.artifact.folder import Artifact
from edge_memllm.engine.feeding import Feeder
from edge_memllm.errors import ArtifactError
from edge_memllm.evaluation import measure_divergence, measure_perplexity
from edge_memllm.overlays import Edit, Overlay, OverlaySpec, overlay_of, write_overlay
from edge_memllm.overlays.loaded import MOST_CHOICES
from edge_memllm.table.source import RecordSource
from edge_memllm_runtimes import open_runtime
from edge_memllm_runtimes.options import RuntimeOptions
from support.checkpoints import HIDDEN, LAYERS, MakeArtifact
from support.overlays import row
from support.small_model import open_small_model

PROMPT = "one and another"
TEXT = "The quick brown fox jumps over the lazy dog. " * 3


@pytest.fixture
def model(folder: Path) -> Iterator[Model]:
    with open_small_model(folder) as opened:
        yield opened


def overlay(model: Model, name: str, *letters: str, codec: str = "int8-g32") -> Overlay:
    """Gives letters rows of their own, in layer 1."""
    spec = OverlaySpec.for_model(model.manifest, name, codec=codec)
    tokens = [model.tokenize(letter)[0] for letter in letters]
    return overlay_of(spec, [Edit(token, 1, "replace", row(token)) for token in tokens])


def text(model: Model, **options: Any) -> str:
    return model.generate(PROMPT, max_new_tokens=12, ignore_eos=True, **options)


def test_an_overlay_changes_the_text_until_it_is_removed(model: Model) -> None:
    plain = text(model)
    assert model.add_overlay(overlay(model, "a", "n")) == "a"
    assert model.overlays == ("a",)
    assert text(model) != plain
    model.remove_overlay("a")
    assert model.overlays == ()
    assert text(model) == plain
    assert model.source is model.table


def test_an_empty_overlay_changes_nothing(model: Model) -> None:
    plain = text(model)
    model.add_overlay(overlay(model, "empty"))
    assert text(model) == plain


def test_overlays_are_chosen_for_each_generation(model: Model) -> None:
    plain = text(model)
    for name, letter in (("a", "n"), ("b", "e")):
        model.add_overlay(overlay(model, name, letter))
    both = text(model)
    alone = {name: text(model, overlays=[name]) for name in "ab"}
    assert len({plain, both, *alone.values()}) == 4
    assert text(model, overlays=()) == plain
    assert text(model, overlays=("a", "b")) == both
    model.remove_overlay("a")
    assert text(model) == alone["b"]


def test_their_order_matters_where_they_meet(model: Model) -> None:
    spec = OverlaySpec.for_model(model.manifest, "half", codec="f32")
    token = model.tokenize("n")[0]
    model.add_overlay(overlay_of(spec, [Edit(token, 1, "scale", factor=0.5)]))
    model.add_overlay(overlay(model, "a", "n"))
    assert text(model) == text(model, overlays=["a"])
    assert text(model, overlays=["a", "half"]) != text(model)


def test_statistics_and_description_tell_what_was_on(model: Model) -> None:
    for name in "ab":
        model.add_overlay(overlay(model, name, "n"))
    for chosen, expected in ((None, ("a", "b")), (["b"], ("b",)), ((), ())):
        *_, last = model.stream(PROMPT, max_new_tokens=2, overlays=chosen)
        assert last.statistics is not None
        assert last.statistics.overlays == expected
        assert last.statistics.as_dict()["overlays"] == expected
    assert model.describe()["overlays"] == ["a", "b"]


def test_a_batch_and_drafts_get_the_same_text(model: Model) -> None:
    model.add_overlay(overlay(model, "a", "n", "e"))
    alone = [text(model), model.generate("needle", max_new_tokens=9)]
    assert model.generate([PROMPT, "needle"], max_new_tokens=12, ignore_eos=True)[0] == alone[0]
    assert model.generate(["x", "needle"], max_new_tokens=9)[1] == alone[1]
    assert text(model, speculate=4) == alone[0]


def test_a_generation_keeps_the_overlays_it_began_with(model: Model) -> None:
    model.add_overlay(overlay(model, "a", "n"))
    expected = text(model)
    stream = model.stream(PROMPT, max_new_tokens=12, ignore_eos=True)
    found = next(stream).text
    model.remove_overlay("a")
    model.add_overlay(overlay(model, "b", "e"))
    assert found + "".join(piece.text for piece in stream) == expected


def test_threads_choose_for_themselves(model: Model) -> None:
    names = [f"o{number}" for number in range(6)]
    for name, letter in zip(names, "oneand", strict=True):
        model.add_overlay(overlay(model, name, letter))
    choices = [(), *((name,) for name in names), tuple(names), tuple(names[::-1])]
    jobs = [(choice, seed) for seed in range(3) for choice in choices]

    def run(job: tuple[tuple[str, ...], int]) -> str:
        return text(model, overlays=job[0], seed=job[1], sampling=Sampling(1.0))

    expected = [run(job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, jobs)) == expected
    assert len(model._overlays._sources) <= MOST_CHOICES


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (["c"], r"There is no overlay 'c'\. Loaded: a\."),
        (["a", "a"], r"overlays is \['a', 'a'\], expected every name once"),
        ("a", "overlays is 'a', expected a list of names"),
        (3, "overlays is 3, expected a list of names"),
    ],
)
def test_choices_that_cannot_be_are_refused_before_any_work(
    model: Model, chosen: Any, message: str
) -> None:
    model.add_overlay(overlay(model, "a", "n"))
    with pytest.raises(RequestError, match=message):
        model.stream(PROMPT, overlays=chosen)
    with pytest.raises(RequestError, match=message):
        model.generate(PROMPT, overlays=chosen)


def test_overlays_that_cannot_be_added_or_removed(model: Model, tmp_path: Path) -> None:
    model.add_overlay(overlay(model, "a", "n"))
    with pytest.raises(RequestError, match="an overlay named 'a' is loaded already"):
        model.add_overlay(overlay(model, "a", "e"))
    other = dataclasses.replace(overlay(model, "b").spec, identity="sha256:" + "0" * 64)
    with pytest.raises(RequestError, match="Overlay 'b' is for model sha256:000000000000"):
        model.add_overlay(overlay_of(other, []))
    with pytest.raises(ArtifactError, match="does not exist"):
        model.add_overlay(tmp_path / "nothing")
    with pytest.raises(RequestError, match="There is no overlay 'b'"):
        model.remove_overlay("b")
    assert model.overlays == ("a",)


# --- over a real graph -----------------------------------------------------------------------

FORMS = [("fp32", "f32"), ("fp32", "int8"), ("int4", "int4"), ("int8", "f16"), ("int4", "nested8")]


def logits(path: Path, source: RecordSource, ids: list[int]) -> np.ndarray:
    with Artifact.open(path) as artifact:
        runtime = open_runtime(artifact, "cpu", RuntimeOptions(threads=1))
        try:
            with Feeder(runtime, source, 1, 8) as feeder:
                return np.array(feeder.score(0, ids))
        finally:
            runtime.close()


@pytest.mark.parametrize(("weights", "codec"), FORMS)
def test_a_graph_computes_with_the_rows_it_is_given(
    make_artifact: MakeArtifact, tmp_path: Path, weights: str, codec: str
) -> None:
    """A table whose rows were all replaced by another's gives that one's logits, bit for bit."""
    from edge_memllm.overlays.making import write_graft
    from edge_memllm.overlays.table import plain_codec

    path = make_artifact(graph_weights=weights, table_codec=codec)
    other = make_artifact(graph_weights=weights, table_codec=codec, seed=1)
    with edge_memllm.load(path, reader="pread") as model, edge_memllm.load(other) as donor:
        plain = plain_codec(donor.table.layout).id
        spec = OverlaySpec.for_model(model.manifest, "graft", codec=plain)
        file = tmp_path / "graft.overlay.safetensors"
        write_graft(file, spec, donor.table, range(300), range(LAYERS))
        ids = model.tokenize(TEXT)[:8]
        before = logits(path, model.source, ids)
        model.add_overlay(file)
        wire = _wire(model.source), _wire(donor.source)
        for found, expected in zip(*wire, strict=True):
            np.testing.assert_array_equal(found, expected)
        assert np.abs(logits(path, model.source, ids) - before).max() > 0.1
        model.remove_overlay("graft")
        model.add_overlay(overlay_of(spec, []))
        np.testing.assert_array_equal(logits(path, model.source, ids), before)


def _wire(source: RecordSource) -> tuple[np.ndarray, np.ndarray]:
    from edge_memllm.artifact.layout import RecordBuffer

    buffer = RecordBuffer(source.layout, 300)
    source.fetch(np.arange(300), buffer)
    return buffer.wire_bytes(300)


def test_perplexity_and_divergence_see_overlays(
    make_artifact: MakeArtifact, tmp_path: Path
) -> None:
    path = make_artifact()
    with edge_memllm.load(path) as model:
        spec = OverlaySpec.for_model(model.manifest, "quiet")
        tokens = sorted(set(model.tokenize(TEXT)))
        edits = [Edit(token, layer, "blank") for token in tokens for layer in range(LAYERS)]
        file = tmp_path / "quiet.overlay.safetensors"
        write_overlay(file, spec, edits)
        plain = measure_perplexity(model, TEXT)
    with edge_memllm.load(path, overlays=[file]) as over, edge_memllm.load(path) as model:
        assert over.overlays == ("quiet",)
        assert measure_perplexity(over, TEXT).nll != plain.nll
        assert measure_divergence(over, model, TEXT).kl.mean() > 0.01
        over.remove_overlay("quiet")
        assert measure_perplexity(over, TEXT) == plain


def test_the_memory_plan_counts_rows_that_are_changed(make_artifact: MakeArtifact) -> None:
    path = make_artifact()
    with Artifact.open(path) as artifact:
        empty = overlay_of(OverlaySpec.for_model(artifact.manifest, "empty"), [])
    for overlays, expected in (([], False), ([empty], True)):
        with edge_memllm.load(path, overlays=overlays) as model:
            told = str(model.describe()["memory"])
            assert ("rows changed by overlays" in told) == expected


def test_loading_refuses_what_does_not_fit(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    path = make_artifact()
    spec = OverlaySpec("other", "sha256:" + "0" * 64, LAYERS, HIDDEN)
    with pytest.raises(RequestError, match="Overlay 'other' is for model"):
        edge_memllm.load(path, overlays=[overlay_of(spec, [])])
    with pytest.raises(RequestError, match=r"overlays is '.*', expected a list of files"):
        edge_memllm.load(path, overlays=str(tmp_path))
    with Artifact.open(path) as artifact:
        fitting = OverlaySpec.for_model(artifact.manifest, "twice")
    with pytest.raises(RequestError, match="an overlay named 'twice' is loaded already"):
        edge_memllm.load(path, overlays=[overlay_of(fitting, [])] * 2)
