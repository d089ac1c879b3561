"""The finding that docs/explain.md tells is there, in the model that comes along."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

from edge_memllm.interpretation import Questions, explain, open_subject
from edge_memllm.interpretation.findings import Explanation
from support import ROOT

MODEL = ROOT / "examples" / "tiny-english"
# What comes behind it is about an artifact, and runs with the other examples of the documents.
PAGE = (ROOT / "docs" / "explain.md").read_text("utf-8").partition("\n## Words turned down")[0]
TEXT = "The battle took place in France."


@pytest.fixture(scope="module")
def found() -> Explanation:
    questions = Questions(
        texts=(TEXT,), tokens=("took",), keys=((1, 84),), layers=(1,), strongest=3, count=6
    )
    with open_subject(MODEL, threads=1) as subject:
        return explain(subject, questions)


def told(tokens: tuple) -> str:
    """A list of tokens as the page has it in key cards."""
    return "  ".join(f"'{each.token.text}' {each.value:+.2f}" for each in tokens)


def test_memory_makes_the_word_likely(found: Explanation) -> None:
    (sentence,) = found.sentences
    place = [token.text for token in sentence.targets].index(" place")
    assert sentence.memory_effect[place] == pytest.approx(8.25, abs=0.01)
    layers = sentence.layer_effect[place]
    assert layers.argmax() == 1
    assert layers[1] == pytest.approx(1.12, abs=0.01)
    direct = sentence.direct
    assert direct is not None
    assert direct.memory[place].sum() == pytest.approx(9.06, abs=0.01)
    assert direct.attention[place].sum() == pytest.approx(3.34, abs=0.01)


def test_the_row_and_its_keys_say_what_follows(found: Explanation) -> None:
    (use,) = found.tokens[0].layers
    assert [each.token.text for each in use.promotes[:3]] == [" place", " over", " care"]
    assert [key.card.key for key in use.keys] == [84, 331, 239]
    assert use.keys_for_half == 3
    assert f"key 1:84  {use.keys[0].share:+.1%}, c = {use.keys[0].coefficient:+.2f}" in PAGE


def test_the_key_card_is_the_pages(found: Explanation) -> None:
    (card,) = found.keys
    for tokens in (card.fires, card.inverts, card.suppresses):
        assert told(tokens) in PAGE


def test_the_python_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    first, *others = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(first, "docs/explain.md", "exec"), {})
    assert out.getvalue() in PAGE
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile("\n".join(others), "docs/explain.md", "exec"), {})
