"""What a suppression does to a text, against the figures worked out from all logits at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_memllm import RequestError
from edge_memllm.engine.feeding import Feeder
from edge_memllm.errors import ArtifactError
from edge_memllm.interpretation.explaining import Subject, open_subject
from edge_memllm.interpretation.suppression import Wish, effects, suppress, words_of
from edge_memllm.interpretation.suppression_effect import SuppressionEffect, measure_suppression
from edge_memllm.interpretation.tokens import word_tokens
from edge_memllm.overlays import OverlaySpec, overlay_of
from edge_memllm.overlays.table import OverlaidTable
from edge_memllm.text.token_texts import TokenTexts
from support.checkpoints import BOS, VOCABULARY, MakeArtifact, MakeCheckpoint
from support.small_model import byte_tokenizer

TEXT = "An owl and a fox. " * 3
WISH = Wish(words=("o", "#97"), most=50)


@pytest.fixture(params=["artifact", "checkpoint"])
def model(
    request: pytest.FixtureRequest, make_artifact: MakeArtifact, make_checkpoint: MakeCheckpoint
) -> Path:
    if request.param == "artifact":
        return make_artifact(graph_weights="fp32", table_codec="f32", beta=1)
    return make_checkpoint(beta=1)


def spec_of(subject: Subject) -> OverlaySpec:
    return OverlaySpec.for_model(subject.predictor.manifest, "test", codec="f32")


def all_logits(subject: Subject, table: object, ids: list[int]) -> np.ndarray:
    with Feeder(subject.predictor.runtime, table, 1, 512) as feeder:  # type: ignore[arg-type]
        return np.array(feeder.score(0, ids[:-1]), np.float64)


def probabilities(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def test_the_figures_are_those_of_the_logits(model: Path) -> None:
    ids = [BOS, *byte_tokenizer().encode(TEXT)]
    with open_subject(model, threads=1) as subject:
        words = words_of(subject, WISH)
        found = suppress(subject, WISH, words)
        spec = spec_of(subject)
        measured = effects(subject, spec, found, words, [TEXT])
        table = OverlaidTable(
            subject.predictor.source, [overlay_of(spec, found.edits())], VOCABULARY
        )
        before, after = (
            probabilities(all_logits(subject, each, ids))
            for each in (subject.predictor.source, table)
        )
    effect, targets = measured.suppression, np.array(ids[1:])
    hit = np.isin(targets, words.ids)
    assert (effect.tokens, effect.occurrences) == (len(targets), hit.sum())
    for side, p in ((effect.before, before), (effect.after, after)):
        own = p[np.arange(len(targets)), targets]
        mass = p[:, words.ids].sum(axis=1)
        assert side.probability == pytest.approx(own[hit].mean(), rel=1e-3)
        assert side.log_probability == pytest.approx(np.log(own[hit]).mean(), abs=1e-3)
        ranks = 1 + (p > own[:, None]).sum(axis=1)
        assert side.rank == pytest.approx(np.median(ranks[hit]), abs=1)
        assert side.mass == pytest.approx(mass.mean(), rel=1e-3)
        elsewhere, others = (np.exp(-np.log(each[~hit]).mean()) for each in (own, own / (1 - mass)))
        assert side.perplexity_elsewhere == pytest.approx(elsewhere, rel=1e-3)
        assert side.perplexity_of_others == pytest.approx(others, rel=1e-3)
    rest = [np.delete(p, words.ids, axis=1) for p in (before, after)]
    truth, changed = (p / p.sum(axis=1, keepdims=True) for p in rest)
    divergence = (truth * np.log(truth / changed)).sum(axis=1).mean()
    assert effect.divergence == pytest.approx(divergence, rel=1e-2, abs=1e-5)
    assert effect.after.mass < effect.before.mass
    assert measured.other_rows.before == measured.other_directions.before == effect.before
    assert measured.other_rows.after != effect.after != measured.other_directions.after


def test_nothing_turned_down_changes_nothing(model: Path) -> None:
    wish = Wish(words=("o",), strength=0.0)
    with open_subject(model, threads=1) as subject:
        words = words_of(subject, wish)
        found = suppress(subject, wish, words)
        measured = effects(subject, spec_of(subject), found, words, [TEXT])
    for each in (measured.suppression, measured.other_rows, measured.other_directions):
        assert each.after == each.before
        assert each.divergence == 0


def measured_apart(model: Path, texts: list[str]) -> SuppressionEffect:
    with open_subject(model, threads=1) as subject:
        words = words_of(subject, WISH)
        found = suppress(subject, WISH, words)
        spec = spec_of(subject)
        return effects(subject, spec, found, words, texts, context=32, stride=8).suppression


def test_texts_count_together_in_windows_of_their_own(make_checkpoint: MakeCheckpoint) -> None:
    model = make_checkpoint(beta=1)
    first, second, both = (
        measured_apart(model, texts) for texts in ([TEXT], ["oooo"], [TEXT, "oooo"])
    )
    assert both.tokens == first.tokens + second.tokens
    assert both.occurrences == first.occurrences + 4
    mass = first.after.mass * first.tokens + second.after.mass * second.tokens
    assert both.after.mass == pytest.approx(mass / both.tokens)
    assert second.after.perplexity_elsewhere == 1.0  # there is nothing else


def test_a_text_without_the_words(make_checkpoint: MakeCheckpoint) -> None:
    effect = measured_apart(make_checkpoint(beta=1), ["The quick"])
    assert effect.occurrences == 0
    assert effect.after.probability is effect.after.log_probability is effect.after.rank is None
    assert effect.after.perplexity_elsewhere > 1


def test_frequent_tokens_come_first_with_a_corpus(make_checkpoint: MakeCheckpoint) -> None:
    with open_subject(make_checkpoint(beta=1), threads=1) as subject:
        wish = Wish(words=("o",), most=5, corpus="abcab")
        words = words_of(subject, wish)
        assert set(suppress(subject, wish, words).tokens) <= set(byte_tokenizer().encode("abc"))


def test_progress_and_windows(make_checkpoint: MakeCheckpoint) -> None:
    told: list[tuple[str, int, int]] = []
    with open_subject(make_checkpoint(beta=1), threads=1) as subject:
        model = subject.predictor
        measure_suppression(
            model.runtime,
            model.source,
            [],
            [[BOS, 1, 2, 3]],
            np.array([1]),
            context=2,
            stride=1,
            progress=lambda *step: told.append(step),
        )
        words = words_of(subject, WISH)
        found = suppress(subject, WISH, words)
        with pytest.raises(RequestError, match="context is 600, expected 1 to the model's 512"):
            effects(subject, spec_of(subject), found, words, [TEXT], context=600)
    assert told[-1] == ("text", 3, 3)


def test_an_artifact_has_no_keys(make_artifact: MakeArtifact) -> None:
    with open_subject(make_artifact(), threads=1) as subject:
        wish = Wish(words=("o",), by="keys")
        with pytest.raises(RequestError, match="An artifact has no keys"):
            suppress(subject, wish, words_of(subject, wish))


def test_a_dense_model_has_nothing_to_turn_down(make_artifact: MakeArtifact) -> None:
    with pytest.raises(ArtifactError, match="dense"), open_subject(make_artifact(beta=8)):
        pass


SPELLINGS = {
    " cat": [1],
    "cat": [2],
    " dog": [3],
    "dog": [4, 5],
    " emu": [3, 6],
    "emu": [7, 6],
    " hen": [1],
    "hen": [1],
    "gap": [],
    " gap": [],
}


class Pieces:
    """A tokenizer that knows a few spellings."""

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        assert not special
        return SPELLINGS[text]

    def decode(self, ids: list[int]) -> str:
        return f"<{ids[0]}>"

    def spelling(self, token: int) -> str:
        return f"<{token}>"


def named(*words: str, pieces: bool = False) -> tuple[list[tuple[int, str, bool]], list[int]]:
    tokenizer = Pieces()
    texts = TokenTexts(tokenizer, 300)  # type: ignore[arg-type]
    found = word_tokens(tokenizer, texts, words, pieces=pieces)  # type: ignore[arg-type]
    taken = [(each.token.id, each.spelling, each.whole) for each in found.taken]
    assert found.ids.tolist() == sorted(token for token, _, _ in taken)
    return taken, [each.token.id for each in found.left_out]


def test_words_are_the_tokens_they_begin_with() -> None:
    assert named("cat") == ([(1, " cat", True), (2, "cat", True)], [])
    assert named(" cat") == ([(1, " cat", True)], [])
    assert named("dog") == ([(3, " dog", True)], [4])
    assert named("dog", pieces=True) == ([(3, " dog", True), (4, "dog", False)], [])
    assert named("#12") == ([(12, "<12>", True)], [])
    assert named("cat", "hen", "cat")[0] == [(1, " cat", True), (2, "cat", True)]
    # What is whole in one word stays so when another begins with it.
    for order in (("emu", "dog"), ("dog", "emu")):
        taken, left_out = named(*order, pieces=True)
        assert sorted(taken) == [(3, " dog", True), (4, "dog", False), (7, "emu", False)]
        assert left_out == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "There is no word"),
        (("",), "'' is no word"),
        (("  ",), "'  ' is no word"),
        (("#300",), "token #300 is not in the vocabulary"),
        (("emu",), r"'emu' is not one token .*begin with '<3>' \(#3\) and '<7>' \(#7\).*--pieces"),
        (("gap",), "'gap' is not one token of this vocabulary. Take"),
    ],
)
def test_words_that_cannot_be_turned_down(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        named(*words)
