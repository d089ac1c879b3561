from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.browser import Browser, Page, SpellingRuntime, visit
from support.server import TEMPLATE, Served, serving_small


@pytest.fixture
def runtime() -> SpellingRuntime:
    return SpellingRuntime()


@pytest.fixture
def served(folder: Path, runtime: SpellingRuntime) -> Iterator[Served]:
    with serving_small(folder, runtime, template=TEMPLATE) as found:
        yield found
        runtime.gate.set()


@pytest.fixture
def page(browser: Browser, served: Served) -> Iterator[Page]:
    opened = visit(browser, served)
    yield opened
    assert opened.complaints() == []
