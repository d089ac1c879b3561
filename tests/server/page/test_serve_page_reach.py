"""The page for everybody: by keyboard alone, read aloud, on a phone, in both themes, copied."""

from __future__ import annotations

import json
from typing import Any

import pytest

from support.browser import (
    WORDS,
    Browser,
    Page,
    SpellingRuntime,
    ask,
    click,
    fill,
    reload,
    texts,
    until,
    visit,
    written,
)
from support.engine import wait_until
from support.server import Served

FOCUSED = (
    "(x => x.id || x.name && `${x.name}=${x.value}` || x.dataset.do || x.className"
    " || x.textContent)(document.activeElement)"
)
PROMPT = "document.getElementById('prompt').value"
RICH = (
    "# A title\n\nSome **bold** words and `code` and [a link](https://a.invalid/"
    + "x" * 90
    + ").\n\n```python\nprint('"
    + "y" * 120
    + "')\n```\n\n| a | b | c |\n|---|---|---|\n| "
    + "z" * 80
    + " | 2 | 3 |\n\n> quoted\n\n- one\n- two\n"
)
CALL = {"id": "c1", "name": "weather_of_a_city", "arguments": '{"city": "' + "w" * 90 + '"}'}
# Text that stands directly in an element, against the nearest grounds behind it that are solid.
CONTRASTS = """
(() => {
  const canvas = new OffscreenCanvas(1, 1).getContext('2d', { willReadFrequently: true });
  const over = (below, colour) => {
    canvas.fillStyle = below; canvas.fillRect(0, 0, 1, 1);
    canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return `rgb(${[...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).join(' ')})`;
  };
  const ground = (x) => over(x.parentElement ? ground(x.parentElement) : 'white',
    getComputedStyle(x).backgroundColor);
  const light = (colour) => {
    const parts = colour.match(/[0-9]+/g).map((each) => {
      const v = each / 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const x = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || !x.checkVisibility({ checkVisibilityCSS: true })) continue;
    if (x.matches('option, script, noscript, .hidden') || x.closest(':disabled')) continue;
    const behind = ground(x);
    const [low, high] = [light(behind), light(over(behind, getComputedStyle(x).color))]
      .sort((a, b) => a - b);
    found.push([(high + 0.05) / (low + 0.05), walk.currentNode.data.trim().slice(0, 40)]);
  }
  return found;
})()
"""


def rich(page: Page) -> None:
    """Have the page show a kept chat with all that replies may hold."""
    bare: dict[str, Any] = {"results": None, "calls": [], "notes": ["12 tokens"], "ended": "stop"}
    turns = [
        {**bare, "asked": "q" * 200, "reply": RICH, "reasoning": "v" * 200},
        {**bare, "asked": "And now?", "reply": "", "calls": [CALL]},
    ]
    kept = {"id": "one", "kind": "chat", "title": "", "system": "Be brief.", "changed": 1}
    page.evaluate(
        "localStorage['edge-memllm-conversation-one'] = "
        f"JSON.stringify({json.dumps({**kept, 'turns': turns})})"
        "; sessionStorage['edge-memllm-window-conversation'] = 'one'"
    )
    reload(page, 2)
    click(page, "[data-do=edit]")
    page.evaluate("document.querySelectorAll('details').forEach((x) => { x.open = true })")


def go_to(page: Page, wanted: str, *, back: bool = False) -> None:
    """Press the Tab key until something has the focus."""
    seen = []
    for _ in range(40):
        seen.append(page.evaluate(FOCUSED))
        if seen[-1] == wanted:
            return
        page.press("Tab", shift=back)
    raise AssertionError(f"the Tab key does not lead to {wanted!r}: {seen}")


def test_a_chat_by_keyboard_alone(page: Page, served: Served) -> None:
    assert page.evaluate(FOCUSED) == "prompt"
    fill(page, "max_tokens", "4")
    page.call("Input.insertText", text="One")
    page.press("Enter", shift=True)
    page.call("Input.insertText", text="two")
    assert page.evaluate(PROMPT) == "One\ntwo"
    go_to(page, "send")
    page.press("Space")
    written(page)
    assert texts(page, ".asked") == ["One\ntwo"]
    assert page.evaluate(FOCUSED) == "prompt", "the button that had the focus is gone"
    go_to(page, "again", back=True)
    page.press("Enter")
    written(page)
    go_to(page, "words markdown", back=True)
    page.press("ArrowRight")
    assert len(texts(page, ".words .selected")) == 1
    go_to(page, "edit", back=True)
    page.press("Enter")
    page.press("Escape")
    assert page.evaluate(FOCUSED) == "edit"
    page.press("Enter")
    page.call("Input.insertText", text="!")
    page.press("Enter")
    written(page)
    assert texts(page, ".asked") == ["One\ntwo!"]


def test_choices_by_keyboard_alone(page: Page) -> None:
    go_to(page, "mode=chat", back=True)
    page.press("ArrowRight")
    assert texts(page, "#prompt-label") == ["Text to continue"]
    go_to(page, "mode=complete", back=True)  # focus went to where one types
    page.press("Tab", shift=True)
    assert page.evaluate(FOCUSED) == "skip"
    seen = page.evaluate("document.activeElement.getBoundingClientRect().width")
    assert seen > 20, "what skips to the prompt is seen once it has the focus"
    page.press("Enter")
    assert page.evaluate(FOCUSED) == "prompt"


def test_conversations_by_keyboard_alone(page: Page) -> None:
    ask(page, "First", mode="chat", tokens=3)
    written(page)
    go_to(page, "rename", back=True)
    page.press("Space")
    page.call("Input.insertText", text="Named")
    page.press("Enter")
    assert texts(page, "#conversations [data-do=open]") == ["Named"]
    go_to(page, "new", back=True)
    page.press("Enter")
    assert texts(page, ".entry") == []
    go_to(page, "delete", back=True)
    page.press("Enter")
    assert texts(page, "#conversations li") == []
    page.press("Enter")
    assert texts(page, "#conversations [data-do=open]") == ["Named"]
    go_to(page, "open")
    page.press("Enter")
    assert texts(page, ".asked") == ["First"]


def test_a_word_of_an_input_method_is_not_sent(page: Page) -> None:
    page.evaluate("document.getElementById('prompt').value = 'に'")
    sent = "new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, cancelable: true})"
    assert page.evaluate(f"document.getElementById('prompt').dispatchEvent({sent})")
    assert texts(page, ".entry") == []


@pytest.mark.parametrize("way", ["prompt", "reply"])
def test_a_reply_is_stopped_by_keyboard(
    page: Page, served: Served, runtime: SpellingRuntime, way: str
) -> None:
    runtime.pause_at = 6
    ask(page, "Hello", mode="chat", tokens=90)
    until(page, f"document.querySelectorAll('{WORDS}').length > 2")
    go_to(page, "stop" if way == "prompt" else "words markdown", back=way == "reply")
    page.press("Enter" if way == "prompt" else "Escape")
    wait_until(lambda: served.service.metrics.under_way == 0)
    runtime.gate.set()
    written(page)
    assert "stopped" in texts(page, ".meta")[0]


def test_what_is_read_aloud(page: Page) -> None:
    ask(page, "Hello", mode="chat", tokens=4)
    written(page)
    page.call("Accessibility.enable")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    told = [
        (each["role"]["value"], each.get("name", {}).get("value", ""))
        for each in nodes
        if not each["ignored"]
    ]
    assert [name for role, name in told if role == "heading" and name in ("You", "Reply")] == [
        "You",
        "Reply",
    ]
    for expected in (
        ("log", "Messages"),
        ("group", "Reply. Arrow keys select its words."),
        ("main", ""),
        ("navigation", "Conversations"),
        ("textbox", "Message"),
        ("radio", "What memory changed"),
    ):
        assert expected in told
    # The end is told once; the words that come are not, one after the other.
    assert ("status", "") in told or any(role == "status" for role, _ in told)
    assert texts(page, "#status") == ["Finished after 4 tokens"]
    assert page.evaluate("document.getElementById('log').getAttribute('aria-live')") == "off"


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_of_a_chat_sticks_out(browser: Browser, served: Served, width: int) -> None:
    page = visit(browser, served, width=width)
    rich(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    wide = page.evaluate(
        "[...document.querySelectorAll('main *, nav *, header *')].filter((x) =>"
        "x.checkVisibility() && !x.closest('pre, .table, .hidden') && (([left, right]) =>"
        "left < 0 || right > innerWidth)(((y) => [y.left, y.right])(x.getBoundingClientRect())))"
        ".map((x) => x.outerHTML.slice(0, 80))"
    )
    assert wide == []
    assert page.complaints() == []


@pytest.mark.parametrize("dark", [False, True])
def test_everything_can_be_read(browser: Browser, served: Served, dark: bool) -> None:
    page = visit(browser, served, dark=dark)
    rich(page)
    faint = [each for each in page.evaluate(CONTRASTS) if each[0] < 4.5]
    assert faint == []


@pytest.mark.parametrize("dark", [False, True])
def test_words_in_the_deepest_colours_can_be_read(
    browser: Browser, served: Served, dark: bool
) -> None:
    page = visit(browser, served, dark=dark)
    ask(page, "Hello", tokens=8)
    written(page)
    page.evaluate("document.querySelector('[value=effect]').disabled = false")
    for colour in ("effect", "origin"):
        click(page, f"[value={colour}]")
        page.evaluate(
            f"document.querySelectorAll('{WORDS}').forEach((x, number) => {{"
            "x.style.setProperty('--v', number % 2 ? 1 : -1);"
            "x.dataset.origin = ['storage', 'cache', 'shared'][number % 3] })"
        )
        faint = [each for each in page.evaluate(CONTRASTS) if each[0] < 4.5]
        assert faint == []


def test_colours_of_words_are_switched(page: Page) -> None:
    shades = (
        "new Set([...document.querySelectorAll('.beginning [data-word]')]"
        ".map((x) => getComputedStyle(x).backgroundColor)).size"
    )
    ask(page, "aabca", tokens=4)
    written(page)
    click(page, ".beginning summary")
    assert page.evaluate("document.querySelector('[name=colour]:checked').value") == "effect"
    click(page, "[value=origin]")
    assert page.evaluate("document.getElementById('legend-effect').hidden")
    assert not page.evaluate("document.getElementById('legend-origin').hidden")
    usual = page.evaluate("document.querySelector('.entry').dataset.usual")
    assert usual == "storage"
    assert page.evaluate(shades) == 2, "those that differ from most have a colour, the rest none"
    assert "read for another word" in texts(page, ".origins")[0]
    click(page, "[value=none]")
    assert page.evaluate("[...document.querySelectorAll('.legend')].every((x) => x.hidden)")
    assert page.evaluate(shades) == 1


@pytest.mark.parametrize("way", ["clipboard", "by hand", "not at all"])
def test_a_question_is_copied(page: Page, way: str) -> None:
    ask(page, "One\ntwo", mode="chat", tokens=3)
    written(page)
    page.evaluate("window.taken = []")
    if way == "clipboard":
        page.evaluate("navigator.clipboard.writeText = async (x) => { taken.push(x) }")
    else:
        page.evaluate("navigator.clipboard.writeText = async () => { throw new Error('no TLS') }")
        page.evaluate(
            "document.execCommand = () => {"
            f"taken.push(getSelection().toString()); return {str(way == 'by hand').lower()} }}"
        )
    click(page, ".question button")
    until(
        page,
        "document.getElementById('status').textContent.includes('opy')"
        " || document.getElementById('status').textContent === 'Copied'",
    )
    assert page.evaluate("taken") == ["One\ntwo"]
    said = "This browser does not let me copy" if way == "not at all" else "Copied"
    assert texts(page, "#status") == [said]
    assert texts(page, ".question button")[0] == said
    until(page, "document.querySelector('.question button').textContent === 'Copy'")
    assert page.evaluate("document.querySelectorAll('textarea.hidden').length") == 0


def test_the_list_is_folded_where_there_is_no_room(browser: Browser, served: Served) -> None:
    for width, expected in ((360, False), (1280, True)):
        page = visit(browser, served, width=width)
        assert page.evaluate("document.getElementById('history').open") is expected
