"""A model that reasons, on the page: what it thinks is shown, folded, kept, and told again."""

from __future__ import annotations

from pathlib import Path

from edge_memllm.text.chat import ChatTemplate
from support.browser import (
    WORDS,
    Browser,
    Page,
    ask,
    click,
    reload,
    replying,
    texts,
    written,
)

# Prompts are of one length, whatever was said; the template knows of reasoning.
TEMPLATE = ChatTemplate("ab{# <think> </think> #}", {})
THOUGHTS = ".thoughts .words"
OPEN = "document.querySelector('.thoughts').open"


def test_thoughts_are_shown_beside_the_reply(browser: Browser, folder: Path) -> None:
    with replying(browser, folder, "<think>*a* <b></think>c d", TEMPLATE) as page:
        assert texts(page, THOUGHTS) == ["a <b>"]
        assert texts(page, THOUGHTS + " em") == ["a"]
        assert texts(page, ".entry > .words") == ["c d"]
        assert not page.evaluate(OPEN)
        click(page, ".thoughts summary")
        click(page, THOUGHTS + " [data-word]", 0)
        assert texts(page, ".thoughts .inspector .token") == ["a"]
        click(page, WORDS, 0)
        assert texts(page, ".inspector .token")[-1] == "c"


def test_thoughts_are_kept_and_handed_to_the_template(browser: Browser, folder: Path) -> None:
    with replying(browser, folder, "<think>a</think>c", TEMPLATE) as page:
        reload(page, 1)
        assert (texts(page, THOUGHTS), texts(page, ".entry > .words")) == (["a"], ["c"])
        assert not page.evaluate(OPEN)
        page.evaluate(
            "window.asked = []; window.real = fetch; window.fetch = (path, options) => {"
            "asked.push(JSON.parse(options.body ?? 'null')); return real(path, options) }"
        )
        ask(page, "?", mode="chat", tokens=3)
        written(page, 2)
        messages = page.evaluate("asked.find((x) => x?.messages).messages")
        assert messages[1] == {"role": "assistant", "reasoning_content": "a", "content": "c"}


def test_thoughts_that_never_ended_stay_open(browser: Browser, folder: Path) -> None:
    with replying(browser, folder, "<think>abc", TEMPLATE) as page:
        assert (texts(page, THOUGHTS), texts(page, ".entry > .words")) == (["abc"], [""])
        assert page.evaluate(OPEN)
        assert "no reply" in texts(page, ".meta")[0]


def test_a_model_that_does_not_reason_has_no_thoughts(page: Page) -> None:
    ask(page, "Hello", mode="chat")
    written(page)
    assert page.evaluate("getComputedStyle(document.querySelector('.thoughts')).display") == "none"
