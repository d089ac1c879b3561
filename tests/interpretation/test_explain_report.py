"""The report as HTML: whole for any findings, closed to the outside, and safe for any token."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import unicodedata
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_memllm.interpretation.findings import Curve, Explanation, KeyUse, LayerClusters
from edge_memllm.interpretation.report import html_page
from edge_memllm.interpretation.report.markup import (
    MINUS,
    Markup,
    element,
    figure,
    percent,
    running,
    scaled,
    visible,
)
from edge_memllm.interpretation.report.page import as_used
from support import ROOT
from support.interpretation import ALL, HOSTILE, explanation, key_card, layer_curves, sentence

DASH = "\N{EN DASH}"
TINY_LAYERS, TINY_POINTS = 6, 2000
LARGEST = 2_000_000
# The only addresses a page may hold: a name of a vocabulary, no place to load anything from.
SVG = "http://www.w3.org/2000/svg"


class Elements(HTMLParser):
    """Every element of a page with its attributes, and the text of scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.texts: list[str] = []
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        (self.scripts if self._inside == "script" else self.texts).append(data)

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""


@pytest.fixture(scope="module")
def page() -> str:
    return html_page(explanation())


@pytest.fixture(scope="module")
def elements(page: str) -> Elements:
    return Elements(page)


def data_of(page: str) -> dict[str, Any]:
    return dict(json.loads(Elements(page).scripts[0]))


def test_hostile_tokens_make_no_element_and_no_handler(elements: Elements) -> None:
    names = [name for name, _ in elements.found]
    assert names.count("script") == 2
    assert not {"img", "iframe", "object", "b&gt;"} & set(names)
    for name, attributes in elements.found:
        assert not [key for key in attributes if key.startswith("on")], name
    assert any("</script><script>alert(1)</script>" in text for text in elements.texts)


def test_nothing_is_loaded_from_anywhere(page: str, elements: Elements) -> None:
    assert set(re.findall(r"https?://[^\"'\s<)]*", page)) <= {SVG}
    assert "url(" not in page
    assert "@import" not in page
    for name, attributes in elements.found:
        assert "src" not in attributes, name
        href = attributes.get("href")
        assert href is None or href == "data:," or href.startswith("#"), name


def test_links_and_labels_lead_somewhere(elements: Elements) -> None:
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    for name, attributes in elements.found:
        if name == "a":
            assert (attributes["href"] or "")[1:] in ids


def test_the_policy_allows_the_page_s_own_script_alone(elements: Elements) -> None:
    (policy,) = (
        attributes["content"] or ""
        for _, attributes in elements.found
        if attributes.get("http-equiv") == "Content-Security-Policy"
    )
    digest = base64.b64encode(hashlib.sha256(elements.scripts[1].encode()).digest()).decode()
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}';" in policy


def test_the_page_is_text_that_can_be_stored(page: str) -> None:
    assert page.encode("utf-8")
    assert page == html_page(explanation())
    hidden = {each for each in page if unicodedata.category(each) in {"Cc", "Cf", "Cs"}}
    assert hidden <= {"\n"}


def test_the_page_of_a_tiny_model_is_light() -> None:
    made = explanation(TINY_LAYERS, points=TINY_POINTS, clusters=24)
    assert len(html_page(made).encode()) < LARGEST


EMPTY = Explanation(explanation().model, "edge-memllm explain checkpoint")
PARTS = ("tokens", "keys", "sentences", "similar", "clusters", "curves")


@pytest.mark.parametrize("part", PARTS)
def test_every_part_can_stand_alone(part: str) -> None:
    alone = html_page(replace(EMPTY, **{part: getattr(explanation(), part)}))
    found = Elements(alone).found
    assert [name for name, _ in found].count("h2") == 1
    assert "nav" not in [name for name, _ in found]


def keys_of(value: Any) -> set[str]:
    """Every key in a JSON value, however deep."""
    if isinstance(value, dict):
        return set(value).union(*map(keys_of, value.values()))
    return set().union(*map(keys_of, value)) if isinstance(value, list) else set()


def test_the_documents_name_every_key_of_the_json() -> None:
    page = ROOT.joinpath("docs", "explain.md").read_text("utf-8")
    section = page[page.index("## The same as JSON") :]
    named = set(re.findall(r"[`\"](\w+)[`\"]", section))
    assert keys_of(explanation().as_dict()) <= named


def test_nothing_found_is_a_page_too() -> None:
    assert "made-up" in html_page(replace(EMPTY, model=replace(EMPTY.model, name="made-up")))


def test_without_a_checkpoint_there_are_no_direct_parts() -> None:
    made = html_page(replace(EMPTY, sentences=(sentence(3, (0, 1, 2), direct=False),)))
    (facts,) = data_of(made)["sentences"]
    assert [each["name"] for each in facts["measures"]] == ["Effect of memory"]
    assert "need a checkpoint" in made


def test_the_script_gets_the_figures_of_the_findings() -> None:
    said = explanation().sentences[0]
    (facts,) = data_of(html_page(explanation()))["sentences"]
    effect, memory, attention = facts["measures"]  # no FFN-C: its parts are zeros
    assert said.direct is not None
    np.testing.assert_allclose(effect["total"], said.memory_effect, rtol=1e-3)
    np.testing.assert_allclose(np.transpose(effect["layers"]), said.layer_effect, rtol=1e-3)
    np.testing.assert_allclose(np.transpose(memory["layers"]), said.direct.memory, rtol=1e-3)
    np.testing.assert_allclose(attention["total"], said.direct.attention.sum(1), rtol=1e-3)


def test_ffn_c_is_shown_where_there_is_one() -> None:
    said = sentence(2, (0, 1, 2))
    assert said.direct is not None
    flex = replace(said, direct=replace(said.direct, compute=np.ones((3, 2))))
    (facts,) = data_of(html_page(replace(EMPTY, sentences=(flex,))))["sentences"]
    assert [each["name"] for each in facts["measures"]][-1] == "FFN-C, direct"
    assert facts["measures"][-1]["total"] == [2, 2, 2]


def test_a_map_s_words_are_in_the_order_of_its_points() -> None:
    found = explanation(1).clusters[0]
    made = html_page(explanation(1))
    data = data_of(made)["clusters"]
    groups = re.findall(r'<g class="dots" data-c="(\d+)"[^>]*><path d="([^"]*)"', made)
    assert len(groups) == len({point.cluster for point in found.points})
    for (cluster, drawn), words in zip(groups, data["maps"][0], strict=True):
        texts = [visible(p.token.text) for p in found.points if p.cluster == int(cluster)]
        assert [data["words"][word] for word in words] == texts
        assert drawn.count("M") == len(texts)


def test_a_map_keeps_its_proportions_and_its_frame() -> None:
    found = explanation(1, points=60).clusters[0]
    wide = tuple(replace(each, x=each.x * 100) for each in found.points)
    one = tuple(replace(each, x=1.0, y=2.0) for each in found.points)
    for points in (found.points, wide, one):
        made = html_page(replace(EMPTY, clusters=(replace(found, points=points),)))
        drawn = "".join(re.findall(r'<g class="dots"[^>]*><path d="([^"]*)"', made))
        places = [(int(x), int(y)) for x, y in re.findall(r"M(\d+) (\d+)h0", drawn)]
        assert len(places) == 60
        assert all(0 <= x <= 640 and 0 <= y <= 520 for x, y in places)


def test_clusters_need_neither_a_map_nor_agreements() -> None:
    found: LayerClusters = explanation(1).clusters[0]
    made = html_page(replace(EMPTY, clusters=(replace(found, points=(), agreements=()),)))
    assert "<svg" not in made
    assert "words ending in" in made


def test_a_key_with_a_coefficient_below_zero_is_turned_round() -> None:
    card = key_card(0, 5)
    assert as_used(KeyUse(card, 1.0, 0.5)) == card
    used = as_used(KeyUse(card, -1.0, 0.5))
    assert (used.fires, used.inverts) == (card.inverts, card.fires)
    assert [each.value for each in used.promotes] == [-each.value for each in card.suppresses]
    assert [each.token for each in used.suppresses] == [each.token for each in card.promotes]


def test_what_is_no_number_is_a_dash() -> None:
    broken = sentence(2, (0, 1, 2))
    effects = replace(broken, without_memory=np.array([math.nan, -math.inf, -1.0]))
    curves = replace(
        layer_curves(2), norms=Curve("Lengths", "Mean.", (math.nan, math.nan), (1.0, math.inf))
    )
    nothing = replace(curves, clustering=Curve("None", "", (math.nan, math.nan)))
    made = html_page(replace(EMPTY, sentences=(effects,), curves=nothing))
    assert data_of(made)["sentences"][0]["measures"][0]["total"][:2] == [None, None]
    assert "None: not a number" in made
    assert "nan" not in Elements(made).texts


@pytest.mark.parametrize(
    ("value", "words"),
    [
        *(
            (0, "0"),
            (0.0123, "0.012"),
            (1.234, "1.23"),
            (-12.34, f"{MINUS}12.3"),
            (4567.8, "4,568"),
        ),
        *((1e-5, "1.0e-5"), (123456.0, "1.2e+5"), (math.nan, DASH), (-math.inf, DASH)),
    ],
)
def test_figures_have_three_digits(value: float, words: str) -> None:
    assert figure(value) == words
    assert figure(value, signed=True) == ("+" + words if value > 0 else words)


@pytest.mark.parametrize(
    ("share", "words"),
    [
        (0.0, "0 %"),
        (0.5, "50 %"),
        (0.0123, "1.2 %"),
        (4e-9, "4.0e-7 %"),
        (-0.25, f"{MINUS}25 %"),
        (math.nan, DASH),
    ],
)
def test_shares_are_written_per_cent(share: float, words: str) -> None:
    assert percent(share) == words


def test_colours_end_at_their_limit() -> None:
    assert scaled(5.0, 2.0) == "--v:1"
    assert scaled(-1.0, 2.0) == "--v:-0.5"
    assert scaled(1.0, 0.0) == scaled(math.nan, 1.0) == "--v:0"


def test_elements_escape_all_but_markup() -> None:
    made = element("p", "<a & b>", Markup("<i></i>"), title='"', hidden=True, lang=None)
    assert made == '<p title="&quot;" hidden>&lt;a &amp; b&gt;<i></i></p>'


@given(st.text(st.characters(codec=None)))
def test_no_token_hides_anything(text: str) -> None:
    for shown in (visible(text), running(text).replace("\n", "").replace(" ", "")):
        assert shown.encode("utf-8") is not None
        assert not {unicodedata.category(each) for each in shown} & {"Cc", "Cf", "Cs", "Zs", "Co"}
    assert visible(text)


def test_tokens_are_shown_as_people_expect() -> None:
    assert visible(" the") == "␣the"
    assert visible("\n\t") == "⏎⇥"
    assert visible("\u0301") == "◌\u0301"
    assert visible("\u202e") == "⟨202E⟩"
    assert visible("") == "∅"
    assert running(" a\nb") == " a⏎\nb"
    assert len({visible(each) for each in HOSTILE}) == len(HOSTILE)
    assert len(ALL) > len(HOSTILE)
