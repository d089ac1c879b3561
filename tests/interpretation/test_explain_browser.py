"""The report in a real browser: quiet, complete, and it answers to mouse and keyboard."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_memllm.interpretation.report import html_page
from edge_memllm.interpretation.report.markup import figure, visible
from support.browser import Browser, Page
from support.interpretation import HOSTILE, explanation

LAYERS, POINTS = 3, 300


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(html_page(explanation(LAYERS, points=POINTS)), encoding="utf-8")
    return path


@pytest.fixture
def page(browser: Browser, report: Path) -> Iterator[Page]:
    opened = browser.open(report)
    yield opened
    assert opened.complaints() == []


def colours(page: Page, selector: str) -> list[str]:
    found = f"[...document.querySelectorAll('{selector}')]"
    return list(page.evaluate(f"{found}.map(x => getComputedStyle(x).backgroundColor)"))


def text(page: Page, selector: str) -> str:
    return str(page.evaluate(f"document.querySelector('{selector}').textContent"))


def choose(page: Page, name: str) -> None:
    page.evaluate(f"document.querySelector('[aria-label=\"{name}\"]').click()")


def test_a_browser_that_complains_is_heard(browser: Browser, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text("<script>console.error('a'); nothing.here()</script><img src=none.png>")
    assert len(browser.open(bad).complaints()) >= 2


def test_it_loads_nothing_and_says_nothing(page: Page, report: Path) -> None:
    assert page.complaints() == []
    assert page.requests() == [report.as_uri()]
    assert page.evaluate("document.documentElement.classList.contains('scripted')")


def test_the_plots_are_there(page: Page) -> None:
    sizes = page.evaluate(
        "[...document.querySelectorAll('.charts svg')].map(x => x.getBoundingClientRect().height)"
    )
    assert len(sizes) == 6
    assert min(sizes) > 100
    drawn = "[...document.querySelectorAll('.map')].map(x => x.querySelectorAll('.dots').length)"
    assert page.evaluate(drawn) == [14] * LAYERS
    seen = "document.querySelector('.map svg').getBBox().width"
    assert page.evaluate(seen) > 300
    assert len(set(colours(page, ".t"))) > 5
    assert len(set(colours(page, ".heat i"))) > 10


def test_hostile_tokens_are_text(page: Page) -> None:
    assert text(page, "h1") == HOSTILE[0]
    shown = page.evaluate("[...document.querySelectorAll('.heat .word')].map(x => x.textContent)")
    assert set(map(visible, HOSTILE)) <= set(shown)
    assert page.evaluate("document.querySelectorAll('img').length") == 0


def test_a_layer_recolours_the_text(page: Page) -> None:
    before = colours(page, ".t"), text(page, ".legend .high")
    choose(page, "Layer 2")
    assert colours(page, ".t") != before[0]
    assert text(page, ".legend .high") != before[1]
    choose(page, "Layer all")
    assert (colours(page, ".t"), text(page, ".legend .high")) == before


def test_a_measure_recolours_text_and_layers(page: Page) -> None:
    before = colours(page, ".t"), colours(page, ".heat i")
    choose(page, "Colour by Attention, direct")
    assert colours(page, ".t") != before[0]
    assert colours(page, ".heat i") != before[1]
    assert "Attention, not" not in text(page, ".definition")
    assert "attention adds" in text(page, ".definition")


def test_arrow_keys_move_through_the_text(page: Page) -> None:
    count = page.evaluate("document.querySelectorAll('.t').length")
    page.evaluate("document.querySelector('.t[tabindex=\"0\"]').focus()")
    for key, place in (("Home", 0), ("ArrowRight", 1), ("ArrowLeft", 0), ("ArrowUp", 0)):
        page.press(key)
        assert page.evaluate("document.activeElement.dataset.t") == str(place)
    page.press("End")
    assert page.evaluate("document.activeElement.dataset.t") == str(count - 1)
    assert page.evaluate("document.querySelectorAll('.t[tabindex=\"0\"]').length") == 1
    assert "probable with memory" in text(page, ".selected")


def test_the_selected_token_s_figures_are_shown(page: Page) -> None:
    page.evaluate('document.querySelector(\'.heat i[data-t="2"][data-l="1"]\').click()')
    assert page.evaluate("document.querySelector('.t[aria-pressed=\"true\"]').dataset.t") == "2"
    rows = page.evaluate(
        "[...document.querySelectorAll('.selected tbody th')].map(x=>x.textContent)"
    )
    assert rows == ["all", "0", "1", "2"]
    assert text(page, ".selected .chosen th") == "1"


def test_the_script_writes_figures_as_the_page_does(page: Page) -> None:
    """Of every token, the column of effects in the panel is the one in the table."""
    said = explanation(LAYERS).sentences[0]
    for place in range(len(said.targets)):
        page.evaluate(f"document.querySelector('.t[data-t=\"{place}\"]').click()")
        column = "[...document.querySelectorAll('.selected tbody td:nth-child(2)')]"
        cells = page.evaluate(f"{column}.map(x => x.textContent)")
        effects = (said.memory_effect[place], *said.layer_effect[place])
        assert cells == [figure(float(each), signed=True) for each in effects]


def test_panels_show_one_layer_at_a_time(page: Page) -> None:
    seen = "[...document.querySelectorAll('#clusters .panel')].map(x => x.hidden)"
    assert page.evaluate(seen) == [False, True, True]
    page.evaluate("document.querySelector('#clusters [aria-label=\"Layer 1\"]').click()")
    assert page.evaluate(seen) == [True, False, True]


def test_pointing_at_the_map_names_the_token(page: Page) -> None:
    page.evaluate("document.querySelector('.map').scrollIntoView()")
    first = (
        "document.querySelector('.dots path').getAttribute('d').match(/M(\\d+) (\\d+)/).slice(1)"
    )
    x, y = map(int, page.evaluate(first))
    box = "document.querySelector('.map svg').getBoundingClientRect()"
    frame = page.evaluate(f"(r => [r.left, r.top, r.width])({box})")
    scale = frame[2] / 640
    page.move(frame[0] + scale * x, frame[1] + scale * y)
    assert page.evaluate("document.querySelector('.tip').hidden") is False
    assert "1: words ending in -a" in text(page, ".tip")
    page.move(frame[0] - 5, frame[1] + 1)
    assert page.evaluate("document.querySelector('.tip').hidden") is True


def test_a_cluster_stays_shown_when_its_button_is_pressed(page: Page) -> None:
    page.evaluate("document.querySelectorAll('button.swatch')[2].click()")
    assert page.evaluate("document.querySelector('.dots.on').dataset.c") == "2"
    pressed = "document.querySelectorAll('button.swatch[aria-pressed=\"true\"]').length"
    assert page.evaluate(pressed) == 1
    page.evaluate("document.querySelectorAll('button.swatch')[2].click()")
    assert page.evaluate("document.querySelectorAll('.dots.on').length") == 0
    assert page.evaluate(pressed) == 0


def test_tokens_are_found_on_the_map(page: Page) -> None:
    page.evaluate(
        "(x => {x.value = '<SCRIPT>'; x.dispatchEvent(new Event('input'))})"
        "(document.querySelector('.finder input'))"
    )
    expected = sum(
        "<script>" in point.token.text
        for point in explanation(LAYERS, points=POINTS).clusters[0].points
    )
    assert text(page, ".finder output").startswith(f"{expected} on this map  </script>")
    found = "document.querySelector('.found').getAttribute('d').split('M').length - 1"
    assert page.evaluate(found) == expected


@pytest.mark.parametrize("width", [320, 375, 768, 1600])
def test_nothing_sticks_out(browser: Browser, report: Path, width: int) -> None:
    page = browser.open(report, width=width)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.complaints() == []


def test_dark_is_dark(browser: Browser, report: Path) -> None:
    light, dark = (colours(browser.open(report, dark=each), "body")[0] for each in (False, True))
    assert light == "rgb(255, 255, 255)"
    assert dark == "rgb(23, 27, 33)"


def test_all_of_it_can_be_read_without_the_script(browser: Browser, report: Path) -> None:
    page = browser.open(report, script=False)
    root = page.call("DOM.getDocument")["root"]["nodeId"]

    def count(selector: str) -> int:
        return len(page.call("DOM.querySelectorAll", nodeId=root, selector=selector)["nodeIds"])

    assert count(".panel") > 3 * LAYERS
    assert count(".panel[hidden]") == 0
    assert count(".switches input") == 0
    assert count("button") == 0
