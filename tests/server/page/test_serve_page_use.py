"""Using the page of the server in a real browser: stopping, settings, errors, any screen."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_memllm import StorageError
from edge_memllm.overlays import Edit, OverlaySpec, overlay_of
from edge_memllm.server.settings import Limits
from support.browser import (
    READY,
    WORDS,
    Browser,
    Page,
    SpellingRuntime,
    ask,
    click,
    fill,
    texts,
    until,
    visit,
    written,
)
from support.engine import wait_until
from support.server import Served, serving, serving_small
from support.small_model import open_small_model


@pytest.mark.parametrize("way", ["button", "Escape", "New"])
def test_it_can_be_stopped(page: Page, served: Served, runtime: SpellingRuntime, way: str) -> None:
    runtime.pause_at = 6
    ask(page, "Hello", tokens=90)
    until(page, f"document.querySelectorAll('{WORDS}').length > 2")
    if way == "Escape":
        page.press("Escape")
    else:
        click(page, "#stop" if way == "button" else "#new")
    # The server has to see it before the next token is let through.
    wait_until(lambda: served.service.metrics.under_way == 0)
    runtime.gate.set()
    served.settled()
    assert len(runtime.steps) <= 7
    assert page.evaluate("document.getElementById('stop').hidden")
    if way == "New":
        assert texts(page, ".entry") == []
    else:
        assert "stopped" in texts(page, ".meta")[0]
        assert texts(page, "#status")[0].startswith("Stopped after ")
    assert texts(page, "#trouble") == [""]


def test_a_model_without_a_template_completes(browser: Browser, folder: Path) -> None:
    with serving_small(folder, limits=Limits(max_tokens=8)) as served:
        page = visit(browser, served)
        assert page.evaluate("document.querySelector('[value=chat]').disabled")
        assert page.evaluate("document.querySelector('[value=complete]').checked")
        assert "--chat-template" in texts(page, "#chatless")[0]
        assert page.evaluate("document.querySelector('[name=max_tokens]').value") == "8"


def test_overlays_can_be_chosen(browser: Browser, folder: Path) -> None:
    with open_small_model(folder, SpellingRuntime()) as model, serving(model) as served:
        for name in ("quiet", "loud"):
            spec = OverlaySpec.for_model(model.manifest, name)
            model.add_overlay(overlay_of(spec, [Edit(65, 0, "blank")]))
        page = visit(browser, served)
        for number, (chosen, expected) in enumerate(
            [(None, "overlays quiet, loud ·"), (0, "overlays loud ·"), (1, "")], 1
        ):
            if chosen is not None:
                click(page, "[name=overlay]", chosen)
            ask(page, "Hello", tokens=3)
            written(page, number)
            assert expected in texts(page, ".meta")[-1]
            assert ("overlays" in texts(page, ".meta")[-1]) is bool(expected)
        click(page, "[name=memory]")
        assert page.evaluate("document.getElementById('overlays').disabled")


def test_wrong_settings_are_shown_and_not_sent(page: Page, runtime: SpellingRuntime) -> None:
    fill(page, "temperature", "9")
    ask(page, "Hello")
    assert page.evaluate("document.getElementById('settings').open")
    assert page.evaluate("document.activeElement.name") == "temperature"
    assert texts(page, ".entry") == []
    assert runtime.steps == []
    click(page, "[type=reset]")


def test_settings_are_there_with_the_next_visit(browser: Browser, served: Served) -> None:
    first = visit(browser, served)
    fill(first, "top_k", "17")
    second = visit(browser, served)
    assert second.evaluate("document.querySelector('[name=top_k]').value") == "17"
    click(second, "[type=reset]")
    until(second, "!JSON.parse(localStorage['edge-memllm-settings']).top_k")


def test_a_refusal_is_shown_and_the_text_given_back(browser: Browser, served: Served) -> None:
    page = visit(browser, served)
    ask(page, "x" * 200)
    until(page, "!document.getElementById('trouble').hidden")
    (said,) = texts(page, "#trouble")
    assert "128" in said
    top = "document.getElementById('trouble').getBoundingClientRect().top"
    assert 0 < page.evaluate(top) < page.evaluate("innerHeight")
    assert texts(page, ".entry") == []
    assert page.evaluate("document.getElementById('prompt').value") == "x" * 200
    # The browser itself notes in the console that the answer was no 200.
    assert [each for each in page.complaints() if "400" not in each] == []


def test_a_text_that_breaks_off_keeps_what_came(page: Page, runtime: SpellingRuntime) -> None:
    runtime.pause_at = 6
    ask(page, "Hello", tokens=90)
    until(page, f"document.querySelectorAll('{WORDS}').length > 2")
    runtime.broken = StorageError("table.safetensors: gone")
    runtime.gate.set()
    written(page)
    runtime.broken = None
    assert "files cannot be read" in texts(page, "#trouble")[0]
    assert "broke off" in texts(page, ".meta")[0]
    assert len(texts(page, WORDS)) > 2
    ask(page, "Again", tokens=3)
    written(page, 2)
    assert texts(page, "#trouble") == [""]


def test_a_key_is_asked_for(browser: Browser, folder: Path) -> None:
    with serving_small(folder, api_keys=("open sesame",)) as served:
        page = visit(browser, served, "!document.getElementById('lock').hidden")
        for key, expected in (
            ("wrong", "!document.getElementById('lock').hidden"),
            ("open sesame", READY),
        ):
            page.evaluate(f"document.getElementById('key').value = {key!r}")
            click(page, "#lock button")
            until(page, expected)
            if expected != READY:
                until(page, "document.getElementById('refusal').textContent.includes('not open')")
        ask(page, "Hello")
        written(page)
        assert texts(page, "#trouble") == [""]


def test_a_server_that_has_gone_is_noticed(browser: Browser, folder: Path) -> None:
    with serving_small(folder) as served:
        page = visit(browser, served)
    ask(page, "Hello")
    until(page, "!document.getElementById('trouble').hidden")
    assert "cannot be reached" in texts(page, "#trouble")[0]


def test_the_page_follows_a_text_and_not_its_reader(
    browser: Browser, served: Served, runtime: SpellingRuntime
) -> None:
    page = visit(browser, served, width=390)
    below = "document.querySelector('main').getBoundingClientRect().bottom - innerHeight"
    for number in range(1, 5):
        ask(page, "Hello " * 9, tokens=60)
        written(page, number)
    assert abs(page.evaluate(below)) < 2
    runtime.gate.clear()
    ask(page, "Hello", tokens=60)
    page.evaluate("scrollTo({top: 0, behavior: 'instant'})")
    runtime.gate.set()
    written(page, 5)
    assert page.evaluate("scrollY") == 0


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_nothing_sticks_out(browser: Browser, served: Served, width: int) -> None:
    page = visit(browser, served, width=width)
    ask(page, "A long prompt with words", tokens=40)
    written(page)
    click(page, WORDS, 3)
    page.evaluate("document.querySelectorAll('details').forEach(x => { x.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.complaints() == []


def test_dark_is_dark(browser: Browser, served: Served) -> None:
    colour = "getComputedStyle(document.body).backgroundColor"
    light, dark = (visit(browser, served, dark=each).evaluate(colour) for each in (False, True))
    assert (light, dark) == ("rgb(255, 255, 255)", "rgb(23, 27, 33)")


def test_every_control_has_a_name(page: Page) -> None:
    page.call("Accessibility.enable")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    controls = {"button", "textbox", "radio", "checkbox", "spinbutton", "DisclosureTriangle"}
    named = [
        (each["role"]["value"], each.get("name", {}).get("value", ""))
        for each in nodes
        if not each["ignored"] and each["role"]["value"] in controls
    ]
    assert len(named) > 6
    assert [role for role, name in named if not name] == []


def test_without_a_script_it_says_what_is_missing(browser: Browser, served: Served) -> None:
    page = browser.open(f"{served.url}/", script=False)
    root = page.call("DOM.getDocument")["root"]["nodeId"]
    found = page.call("DOM.querySelector", nodeId=root, selector="noscript p")["nodeId"]
    assert "/v1/completions" in page.call("DOM.getOuterHTML", nodeId=found)["outerHTML"]
