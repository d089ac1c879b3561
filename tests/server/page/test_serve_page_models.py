"""The page where several models are served: which one it is for, and the way to another."""

from __future__ import annotations

from pathlib import Path

from support.browser import READY, Browser, ask, click, texts, until, written
from support.several_models import Home, served


def test_another_model_is_chosen_and_loaded_when_it_is_asked(
    browser: Browser, folder: Path
) -> None:
    home = Home(folder)
    with served(home.models()) as url:
        page = browser.open(f"{url}/?model=b")
        until(page, READY)
        assert texts(page, "#model") == ["b"]
        assert "is loaded when it is asked" in texts(page, "#facts")[0]
        listed = [f"{name} (is loaded when it is asked)" for name in ("a", "c")]
        assert texts(page, "#models option") == listed
        page.evaluate("window.before = true")
        page.evaluate("document.getElementById('models').value = 'c'")
        click(page, "#choice button")
        until(page, f"!window.before && document.body && {READY}")
        assert texts(page, "#model") == ["c"]
        ask(page, "Hello", tokens=4)
        written(page)
        assert home.opened == ["c"]
        assert page.complaints() == []


def test_one_model_alone_offers_no_other(browser: Browser, folder: Path) -> None:
    models = Home(folder).models()
    models.all = models.all[:1]
    with served(models) as url:
        page = browser.open(f"{url}/")
        until(page, READY)
        assert page.evaluate("document.getElementById('choice').hidden")
        assert page.complaints() == []
