"""Texts on the page of the server, in a real browser: as the model made them, word by word."""

from __future__ import annotations

import math
import re
from pathlib import Path

from edge_memllm import load
from edge_memllm.server import page as package
from support.browser import (
    WORDS,
    Browser,
    Page,
    ask,
    click,
    fill,
    texts,
    until,
    visit,
    written,
)
from support.checkpoints import MakeArtifact
from support.server import TEMPLATE, Served, serving, serving_small
from support.small_model import ScriptedRuntime, byte_tokenizer

HOSTILE = "<img src=x onerror=alert(1)>&amp;\u202e</p>"


def test_nothing_of_it_is_inline_or_from_elsewhere() -> None:
    files = sorted(Path(package.__file__).parent.iterdir())
    source = {each.name: each.read_text("utf-8") for each in files if each.is_file()}
    html = source["index.html"]
    assert not re.search(r"<style|style=|<script(?! type=\"module\" src)| on\w+=", html)
    assert set(re.findall(r"(?:src|href)=\"/page/([\w.]+)\"", html)) <= set(source)
    assert len(re.findall(r"<script|<link", html)) == 3
    for name, text in source.items():
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|innerHTML|eval\(", text), name


def test_it_asks_this_server_only(page: Page, served: Served) -> None:
    ask(page, "Hello")
    written(page)
    assert {address[: len(served.url)] for address in page.requests()} == {served.url}
    assert texts(page, "#model") == ["small"]
    assert "128 tokens of context" in texts(page, "#facts")[0]


def test_a_text_is_the_one_the_server_makes(page: Page, served: Served) -> None:
    fill(page, "seed", "5")
    fill(page, "temperature", "0.9")
    ask(page, "Hello", tokens=20)
    written(page)
    wanted = {"max_tokens": 20, "seed": 5, "temperature": 0.9}
    expected = served.complete(prompt="Hello", **wanted)["choices"][0]["text"]
    assert "".join(texts(page, WORDS)) == expected
    assert texts(page, ".given") == ["Hello"]
    assert "seed 5" in texts(page, ".meta")[0]
    assert texts(page, "#status") == ["Finished after 20 tokens"]
    assert page.evaluate("document.activeElement.id") == "prompt"


def test_figures_are_those_of_the_text(page: Page, served: Served) -> None:
    ask(page, "abca", tokens=9)
    written(page)
    figures = dict(
        zip(
            page.evaluate(
                "[...document.querySelectorAll('[data-figure]')].map(x => x.dataset.figure)"
            ),
            texts(page, "[data-figure]"),
            strict=True,
        )
    )
    size = served.service.model.manifest.layout.record_bytes
    prompt = len(served.post("/tokenize", {"prompt": "abca"}).json()["tokens"])
    assert (figures["prompt"], figures["reply"]) == (str(prompt), "9")
    assert figures["perToken"] == f"{size} bytes"
    assert figures["promptBytes"] == shown_bytes(size * (prompt - 1))  # "a" is read once
    assert figures["replyBytes"] == shown_bytes(size * 8)  # the last is not fed
    assert re.fullmatch(r"[\d,.]+", figures["speed"])
    assert re.fullmatch(r"[\d.]+ [MG]B", figures["anon"])
    assert re.fullmatch(r"[\d.]+ [MG]B", figures["peak"])
    assert page.evaluate("document.querySelectorAll('#chart rect').length") == 8
    assert "8 of the last 8 records" in texts(page, "#chart-caption")[0]


def test_text_of_a_model_is_never_markup(browser: Browser, folder: Path) -> None:
    script = byte_tokenizer().encode(HOSTILE, special=False)
    with serving_small(folder, ScriptedRuntime(script, prompt_length=2)) as served:
        page = visit(browser, served)
        fill(page, "temperature", "0")
        ask(page, "<b", tokens=len(script))
        written(page)
        assert "".join(texts(page, WORDS)) == HOSTILE
        assert texts(page, ".given") == ["<b"]
        for number in range(len(texts(page, WORDS))):
            click(page, WORDS, number)
        assert page.evaluate("document.querySelectorAll('main img, main b').length") == 0
        assert page.complaints() == []


def test_a_character_of_several_tokens_is_one_word(browser: Browser, folder: Path) -> None:
    script = byte_tokenizer().encode("a€b", special=False)
    with serving_small(folder, ScriptedRuntime(script, prompt_length=1)) as served:
        page = visit(browser, served)
        fill(page, "temperature", "0")
        ask(page, "x", tokens=len(script))
        written(page)
        assert texts(page, WORDS) == ["a", "€", "b"]
        click(page, WORDS, 1)
        assert texts(page, ".inspector .token") == ["<E2>", "<82>", "<AC>"]


def test_a_word_tells_its_record_and_who_shares_it(page: Page) -> None:
    ask(page, "abcab", tokens=6)
    written(page)
    click(page, ".beginning summary")
    click(page, ".beginning [data-word]", 3)
    (panel,) = texts(page, ".inspector")
    assert "read for another word of the same step" in panel
    assert "other place" in panel
    marked = page.evaluate(
        "[...document.querySelectorAll('.beginning [data-word]')]"
        ".map(x => x.classList.contains('twin'))"
    )
    assert marked[0] and not marked[1] and not marked[3]
    shown = "[...document.querySelectorAll('.beginning [data-word]')].map(x => x.dataset.origin)"
    assert page.evaluate(shown) == ["storage"] * 3 + ["shared"] * 2


def test_arrow_keys_go_from_word_to_word(page: Page) -> None:
    ask(page, "Hello", tokens=5)
    written(page)
    page.evaluate("document.querySelector('.entry > .words').focus()")
    last = len(texts(page, WORDS)) - 1
    for key, expected in (("ArrowRight", 0), ("ArrowRight", 1), ("End", last), ("Home", 0)):
        page.press(key)
        assert page.evaluate("document.querySelector('.selected').dataset.word") == str(expected)
        assert page.evaluate("document.querySelectorAll('.selected').length") == 1
    page.press("End")
    assert "not read: a record is read when" in texts(page, ".inspector")[0]


def test_a_chat_goes_on_with_what_was_said(page: Page, served: Served) -> None:
    fill(page, "system", "Be brief.")
    ask(page, "One", mode="chat", tokens=3)
    written(page)
    first = "".join(texts(page, WORDS))
    ask(page, "Two", mode="chat", tokens=3)
    written(page, 2)
    assert texts(page, ".asked") == ["One", "Two"]
    prompt = "".join(texts(page, ".entry:last-child .beginning [data-word]"))
    said = [("system", "Be brief."), ("user", "One"), ("assistant", first), ("user", "Two")]
    messages = [{"role": role, "content": content} for role, content in said]
    assert prompt.endswith(TEMPLATE.render(messages))
    served.settled()


def test_a_text_is_taken_up_again(page: Page) -> None:
    ask(page, "Hello", tokens=4)
    written(page)
    click(page, "[data-do=on]")
    wanted = "Hello" + "".join(texts(page, WORDS))
    assert page.evaluate("document.getElementById('prompt').value") == wanted


def test_what_memory_did_is_measured(browser: Browser, make_artifact: MakeArtifact) -> None:
    with load(make_artifact(graph_weights="fp32"), threads=1) as model, serving(model) as served:
        page = visit(browser, served)
        fill(page, "seed", "1")
        ask(page, "abc", tokens=8)
        written(page)
        click(page, "[value=effect]")
        until(page, "document.querySelector('.meta').textContent.includes('deepest colour')")
        asked = {"prompt": "abc", "seed": 1, "max_tokens": 8, "trace": True}
        trace = served.complete(**asked)["choices"][0]["trace"]
        ids = [each["token"] for each in trace["records"]] + trace["tokens"][-1:]
        whole, bare = (
            served.complete(prompt=ids, echo=True, logprobs=0, max_tokens=0, without_memory=off)
            for off in (False, True)
        )
        effects = [
            left - right
            for left, right in zip(*(_logprobs(each) for each in (whole, bare)), strict=True)
        ]
        click(page, WORDS, 0)
        place, *_, verdict = texts(page, ".inspector > div:first-child dd")
        effect = effects[int(place) - 1]
        expected = "likelier" if effect > 0 else "less likely"
        assert verdict.endswith("next to nothing" if abs(effect) < math.log(1.05) else expected)
        colours = "[...document.querySelectorAll('%s')].map(x => x.style.getPropertyValue('--v'))"
        assert any(float(each) for each in page.evaluate(colours % WORDS))
        assert page.complaints() == []


def test_a_text_that_has_filled_the_context_is_measured(page: Page, served: Served) -> None:
    room = served.service.model.manifest.model.max_position_embeddings
    ask(page, "Hello", tokens=room)
    written(page)
    until(page, "document.querySelector('.meta').textContent.includes('deepest colour')")
    words = texts(page, WORDS)
    click(page, WORDS, len(words) - 2)
    assert "what memory did" in texts(page, ".inspector")[0]
    click(page, WORDS, len(words) - 1)
    assert "what memory did" not in texts(page, ".inspector")[0]


def test_memory_can_be_off(browser: Browser, make_artifact: MakeArtifact) -> None:
    with load(make_artifact(graph_weights="fp32"), threads=1) as model, serving(model) as served:
        page = visit(browser, served)
        fill(page, "temperature", "0")
        click(page, "[name=memory]")
        ask(page, "abc", tokens=8)
        written(page)
        asked = {"prompt": "abc", "temperature": 0, "max_tokens": 8}
        expected = served.complete(**asked, without_memory=True)["choices"][0]["text"]
        assert "".join(texts(page, WORDS)) == expected
        assert "without memory" in texts(page, ".meta")[0]
        assert expected != served.complete(**asked)["choices"][0]["text"]


def test_a_model_without_memory_has_none_to_switch(
    browser: Browser, make_artifact: MakeArtifact
) -> None:
    folder = make_artifact(graph_weights="fp32", beta=8)
    with load(folder, threads=1) as model, serving(model) as served:
        page = visit(browser, served)
        for selector in ("[name=memory]", "[value=effect]"):
            assert page.evaluate(f"document.querySelector('{selector}').disabled")
        ask(page, "Hello")
        written(page)
        assert page.complaints() == []


def shown_bytes(size: int) -> str:
    return f"{size} bytes" if size < 1000 else f"{size / 1000:.3g} kB"


def _logprobs(reply: dict[str, object]) -> list[float]:
    return list(reply["choices"][0]["logprobs"]["token_logprobs"][1:])
