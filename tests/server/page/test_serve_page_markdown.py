"""Markdown of replies on the page: what it means is shown, whatever it is, as text alone."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from edge_memllm.text.chat import ChatTemplate
from support.browser import (
    WORDS,
    Browser,
    Page,
    click,
    reload,
    replying,
    texts,
    until,
    visit,
)
from support.server import Served

# Prompts are of one length, whatever was said, so that a script stands behind each.
CONSTANT = ChatTemplate("ab", {})
HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    "<svg/onload=alert(1)>**x**",
    "[x](javascript:alert(1))",
    "[x](<javascript:alert(1)>)",
    "[x](JaVaScRiPt:alert(1))",
    "[x](data:text/html,<script>alert(1)</script>)",
    "[x](vbscript:x) [y](//evil) [z](/v1/models) [w](file:///etc)",
    "[x](&#106;avascript:alert(1)) [y](java\nscript:alert(1)) [z](\x01javascript:alert(1))",
    '![x](javascript:alert(1)) <https://a.invalid/"onmouseover=alert(1)>',
    '[x](https://a.invalid/"onmouseover="alert(1))',
    '```"><img src=x onerror=alert(1)>\n</code></pre><img src=x onerror=alert(1)>\n```',
    "| <img src=x> | b |\n|---|---|\n| <b onclick=alert(1)>x</b> | `<i>` |",
    "# <style>*{display:none}</style>",
    "1. <iframe src=/v1/models>\n> <form action=https://a.invalid><input>",
    "__proto__ **constructor** [x]: javascript:alert(1)\n[x]",
]


def restored(browser: Browser, served: Served, reply: str) -> Page:
    """The page, with a reply that the browser has kept."""
    page = visit(browser, served)
    keep(page, turn("?", reply))
    reload(page, 1)
    return page


def turn(asked: str, reply: str, **more: Any) -> dict[str, Any]:
    bare = {"results": None, "calls": [], "notes": [], "ended": "stop"}
    return {"asked": asked, "reply": reply, **bare, **more}


def keep(page: Page, *turns: dict[str, Any], id: str = "one") -> None:
    """Put a conversation where the browser keeps them, and have this window open it."""
    fields = {"id": id, "kind": "chat", "title": "", "system": "", "changed": 1, "turns": turns}
    page.evaluate(
        f"localStorage['edge-memllm-conversation-{id}'] = {json.dumps(json.dumps(fields))};"
        f"sessionStorage['edge-memllm-window-conversation'] = {json.dumps(id)}"
    )


def test_markdown_is_shown_as_what_it_means(browser: Browser, served: Served) -> None:
    source = (
        "# One *two*\n\nA **b** ~~c~~ `d*e*` \\*f\\* 2 * 3 g_h_i\nj\n\n- k\n  1. l\n- m\n\n> n\n\n"
        "```py\nif a < b:\n\n    c\n```\n\n| o | p |\n|---|--:|\n| q | r |\n\n---\n"
        "[s](https://a.invalid/x_(y)) https://b.invalid/z. **t"
    )
    page = restored(browser, served, source)
    inside = ".words "
    assert texts(page, inside + "h4") == ["One two"]
    assert texts(page, inside + "h4 em") == ["two"]
    assert texts(page, inside + "> p") == [
        "A b c d*e* *f* 2 * 3 g_h_i\nj",
        "s https://b.invalid/z. **t",
    ]
    assert texts(page, inside + "p strong, .words p del, .words p code") == ["b", "c", "d*e*"]
    assert texts(page, inside + "> ul > li") == ["kl", "m"]
    assert texts(page, inside + "ul ol li") == ["l"]
    assert texts(page, inside + "blockquote") == ["n"]
    assert texts(page, inside + "pre code") == ["if a < b:\n\n    c"]
    assert texts(page, inside + "td") == ["q", "r"]
    hrefs = page.evaluate("[...document.querySelectorAll('.words a')].map((x) => x.href)")
    assert hrefs == ["https://a.invalid/x_(y)", "https://b.invalid/z"]
    assert page.evaluate("document.querySelector('.words a').rel").split()[:2] == [
        "noopener",
        "noreferrer",
    ]


@pytest.mark.parametrize("reply", HOSTILE)
def test_a_hostile_reply_stays_text(browser: Browser, served: Served, reply: str) -> None:
    page = restored(browser, served, reply)
    assert page.evaluate(
        "[...document.querySelectorAll('.entry .words *')].every((x) =>"
        "['P','H4','STRONG','EM','DEL','CODE','PRE','DIV','SPAN','BUTTON','UL','OL','LI','TABLE',"
        "'THEAD','TBODY','TR','TH','TD','BLOCKQUOTE','A','HR'].includes(x.tagName)"
        "&& ![...x.attributes].some((y) => y.name.startsWith('on'))"
        "&& (x.tagName !== 'A' || ['https:', 'mailto:'].includes(x.protocol)))"
    )
    assert page.complaints() == []
    assert all(address.startswith(served.url) for address in page.requests())


def test_whatever_is_written_has_its_leaves_in_order(browser: Browser, served: Served) -> None:
    """Each leaf is a range of the source, behind the one before; nothing fails."""
    draw = random.Random(7)
    signs = ["a", "b ", " ", "\n", "\n\n", "*", "**", "_", "~~", "`", "```", "- ", "1. ", "> ", "|"]
    signs += ["|-", "# ", "[", "](", "https://x.y", ")", "\\", "<", "!", "    ", "---", "\t"]
    drawn = ["".join(draw.choices(signs, k=draw.randint(1, 25))) for _ in range(4000)]
    page = visit(browser, served)
    page.evaluate(
        "window.wrong = null;"
        f"import('/page/markdown.js').then(({{ parse }}) => {{ wrong = {json.dumps(drawn)}"
        ".filter((source) => { let at = 0; let good = true; const look = (each) => {"
        "for (const [start, end] of each.parts ?? []) {"
        "  good &&= at <= start && start <= end && end <= source.length; at = end; }"
        "for (const value of Object.values(each)) if (value && typeof value === 'object'"
        "  && value !== each.parts) look(value); };"
        "try { parse(source).forEach(look); } catch { good = false; } return !good; }) })"
    )
    until(page, "wrong !== null")
    assert page.evaluate("wrong") == []


def test_words_of_markdown_have_their_records(browser: Browser, folder: Path) -> None:
    reply = "# a\n\n**b** `c`\n\n- d\n- e\n\n```\nf\n```\n"
    with replying(browser, folder, reply, CONSTANT) as page:
        assert texts(page, ".words.markdown h4, .words strong, .words li, .words pre") == [
            "a",
            "b",
            "d",
            "e",
            "f",
        ]
        assert [each for each in texts(page, WORDS) if each.strip()] == list("abcdef")
        numbers = page.evaluate(
            f"[...document.querySelectorAll('{WORDS}')].map((x) => Number(x.dataset.word))"
        )
        assert "".join(reply[each] for each in numbers) == "".join(texts(page, WORDS))
        at = next(n for n, each in enumerate(texts(page, WORDS)) if each == "e")
        click(page, WORDS, at)
        assert texts(page, ".inspector .token") == ["e"]
        page.evaluate("document.querySelector('.entry > .words').focus()")
        page.press("ArrowLeft")
        assert texts(page, ".words .selected") == ["d"]


def test_a_reply_that_grows_is_the_one_that_is_read_at_once(browser: Browser, folder: Path) -> None:
    reply = (
        "a\n\n- b\n\n  c\n- d\n\n| e | f |\n|---|---|\n| g | h |\n\n1. i\n\n```\nj\n\nk\n```\n*l*"
    )
    bare = "document.querySelector('.entry > .words').innerHTML.replace(/<\\/?span[^>]*>/g, '')"
    with replying(browser, folder, reply, CONSTANT) as page:
        grown = page.evaluate(bare)
        reload(page, 1)
        assert page.evaluate(bare) == grown


def test_code_and_replies_are_copied_as_they_are(browser: Browser, served: Served) -> None:
    reply = "Say:\n\n```\na <b>\n  c\n```"
    page = restored(browser, served, reply)
    page.evaluate(
        "window.taken = []; navigator.clipboard.writeText = async (x) => { taken.push(x) }"
    )
    click(page, ".code button")
    click(page, ".entry > .actions button")
    until(page, "taken.length === 2")
    assert page.evaluate("taken") == ["a <b>\n  c", reply]
    until(page, "document.getElementById('status').textContent === 'Copied'")


@pytest.mark.parametrize(
    "unit",
    ["*", "**a ", "[", '[](a "', " `", "`` ` ", "> ", "- ", "*_", "- a\n\n", "a\n\n", "| a", "h"],
)
def test_no_reply_holds_the_page_up(browser: Browser, served: Served, unit: str) -> None:
    page = restored(browser, served, unit * 9000)
    assert page.evaluate("document.querySelector('.entry > .words').childElementCount > 0")
