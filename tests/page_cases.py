"""A browser at the page of a server: what tests of the page share."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
from browser import Browser, Page
from serve_cases import Served
from serving_cases import GatedRuntime
from small_model import byte_tokenizer

READY = "document.body.classList.contains('ready')"
WORDS = ".entry > .words [data-word]"


class SpellingRuntime(GatedRuntime):
    """Wants letters only, so that each token is a word."""

    def __init__(self) -> None:
        super().__init__()
        self.broken: Exception | None = None  # what every step fails with

    def step(self, *given: Any, **more: Any) -> Any:
        if self.broken is not None:
            raise self.broken
        logits = super().step(*given, **more).copy()
        letters = byte_tokenizer().encode("abcdefghijklmnop", special=False)
        logits[..., np.delete(np.arange(logits.shape[-1]), letters)] = -1e3
        return logits


def visit(browser: Browser, served: Served, expected: str = READY, **options: object) -> Page:
    page = browser.open(f"{served.url}/", **options)
    until(page, expected)
    return page


def until(page: Page, expression: str) -> None:
    limit = time.monotonic() + 20
    while not page.evaluate(expression):
        assert time.monotonic() < limit, (expression, page.complaints())
        time.sleep(0.02)


def click(page: Page, selector: str, number: int = 0) -> None:
    page.evaluate(f"document.querySelectorAll({json.dumps(selector)})[{number}].click()")


def texts(page: Page, selector: str) -> list[str]:
    found = f"[...document.querySelectorAll({json.dumps(selector)})]"
    return list(page.evaluate(f"{found}.map((each) => each.textContent)"))


def fill(page: Page, name: str, value: str) -> None:
    page.evaluate(
        f"(x => {{ x.value = {json.dumps(value)}; x.dispatchEvent(new Event('input', "
        f"{{bubbles: true}})) }})(document.querySelector('[name={name}]'))"
    )


def ask(page: Page, text: str, *, mode: str = "complete", tokens: int = 12) -> None:
    """Type a text and send it as a person does, with the Enter key."""
    click(page, f"[name=mode][value={mode}]")
    fill(page, "max_tokens", str(tokens))
    page.evaluate("document.getElementById('prompt').focus()")
    page.call("Input.insertText", text=text)
    enter = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
    page.call("Input.dispatchKeyEvent", type="keyDown", **enter)


def written(page: Page, entries: int = 1) -> None:
    """Wait until so many texts have come to their end."""
    until(
        page,
        f"document.querySelectorAll('.entry').length === {entries} && "
        "!document.querySelector('[aria-busy]')",
    )
