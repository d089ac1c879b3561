"""Conversations on the page: kept in the browser, gone on with, edited, and written again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_memllm.text.chat import ChatTemplate
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
from support.checkpoints import EOS
from support.server import TEMPLATE, Served, serving_small
from support.small_model import ScriptedRuntime, byte_tokenizer

TITLES = "#conversations [data-do=open]"
PROMPT = "document.getElementById('prompt').value"


def chat(page: Page, *said: str) -> None:
    before = len(texts(page, ".entry"))
    for number, each in enumerate(said, before + 1):
        ask(page, each, mode="chat", tokens=4)
        written(page, number)


def prompt_of_last(page: Page) -> str:
    return "".join(texts(page, ".entry:last-child .beginning [data-word]"))


def rendered(*said: str, system: str = "") -> str:
    roles = ("user", "assistant") * len(said)
    messages = [{"role": role, "content": each} for role, each in zip(roles, said, strict=False)]
    return TEMPLATE.render(
        [*([{"role": "system", "content": system}] if system else []), *messages]
    )


def test_a_reload_keeps_conversation_instructions_and_draft(page: Page) -> None:
    fill(page, "system", "Be brief.")
    chat(page, "One")
    reply = texts(page, ".entry > .words")[0]
    page.evaluate("document.getElementById('prompt').focus()")
    page.call("Input.insertText", text="half a thou")
    reload(page, 1)
    assert page.evaluate(PROMPT) == "half a thou"
    assert texts(page, ".asked") == ["One"]
    assert texts(page, ".entry > .words") == [reply]
    assert "finished" in texts(page, ".meta")[0] or "cut" in texts(page, ".meta")[0]
    assert page.evaluate("document.activeElement.id") == "prompt"
    ask(page, "ght", mode="chat", tokens=3)
    written(page, 2)
    expected = rendered("One", reply, "half a thought", system="Be brief.")
    assert prompt_of_last(page).endswith(expected)


def test_conversations_are_listed_renamed_deleted_and_brought_back(page: Page) -> None:
    chat(page, "First\nof all")
    click(page, "#new")
    assert texts(page, ".entry") == []
    chat(page, "Second")
    assert texts(page, TITLES) == ["Second", "First"]
    assert texts(page, TITLES + "[aria-current]") == ["Second"]
    click(page, TITLES, 1)
    assert texts(page, ".asked") == ["First\nof all"]
    assert len(texts(page, WORDS)) > 0, "words of this visit keep their records"
    click(page, "#conversations [data-do=rename]", 1)
    page.call("Input.insertText", text="Renamed")
    page.press("Enter")
    assert texts(page, TITLES) == ["Second", "Renamed"]
    click(page, "#conversations [data-do=delete]", 1)
    assert (texts(page, TITLES), texts(page, ".entry")) == (["Second"], [])
    assert page.evaluate("document.activeElement.id") == "undo"
    click(page, "#undo")
    assert texts(page, TITLES) == ["Second", "Renamed"]
    click(page, "#forget")
    assert (texts(page, TITLES), page.evaluate("Object.keys(localStorage).length")) == ([], 1)


def test_a_reply_is_written_again(page: Page) -> None:
    chat(page, "One", "Two")
    first, _ = texts(page, ".entry > .words")
    click(page, ".entry:last-child [data-do=again]")
    until(page, "document.querySelectorAll('.entry').length === 2")
    written(page, 2)
    assert texts(page, ".asked") == ["One", "Two"]
    assert prompt_of_last(page).endswith(rendered("One", first, "Two"))
    assert texts(page, TITLES) == ["One"], "the last reply is replaced, nothing follows it"


def test_a_message_is_edited_and_what_followed_is_kept_beside(page: Page) -> None:
    chat(page, "One", "Two")
    before = texts(page, ".entry > .words")
    click(page, "[data-do=edit]")
    assert page.evaluate("document.activeElement.value") == "One"
    page.call("Input.insertText", text=" and a half")
    page.press("Enter")
    written(page, 1)
    assert texts(page, ".asked") == ["One and a half"]
    assert prompt_of_last(page).endswith(rendered("One and a half"))
    assert sorted(texts(page, TITLES)) == ["One (before)", "One and a half"]
    click(page, TITLES, texts(page, TITLES).index("One (before)"))
    assert texts(page, ".asked") == ["One", "Two"]
    assert texts(page, ".entry > .words") == before


def test_an_edit_that_is_refused_changes_nothing(browser: Browser, served: Served) -> None:
    page = visit(browser, served)
    chat(page, "One", "Two")
    before = texts(page, ".entry > .words")
    click(page, "[data-do=edit]")
    page.call("Input.insertText", text="x" * 200)
    page.press("Enter")
    until(page, "!document.getElementById('trouble').hidden")
    assert texts(page, ".entry > .words") == before
    assert texts(page, TITLES) == ["One"]
    page.press("Escape")


def test_what_a_closed_page_was_writing_is_said_to_have_broken_off(
    browser: Browser, served: Served, runtime: SpellingRuntime
) -> None:
    page = visit(browser, served)
    runtime.pause_at = 6
    ask(page, "Hello", mode="chat", tokens=40)
    until(page, f"document.querySelectorAll('{WORDS}').length > 2")
    came = texts(page, ".entry > .words")[0]
    reload(page, 1)
    runtime.gate.set()
    assert texts(page, ".entry > .words")[0].startswith(came)
    assert "broke off" in texts(page, ".meta")[0]


def test_two_windows_see_each_other(browser: Browser, served: Served) -> None:
    one, other = visit(browser, served), visit(browser, served)
    chat(one, "From the first")
    until(other, f"document.querySelectorAll('{TITLES}').length === 1")
    click(other, TITLES)
    assert texts(other, ".asked") == ["From the first"]
    chat(other, "From the second")
    until(one, "document.querySelectorAll('.asked').length === 2")


@pytest.mark.parametrize(
    "kept",
    ["", "{", "null", "[]", '{"id": "x"}', json.dumps({"id": "x", "kind": "chat", "turns": [1]})],
)
def test_what_is_no_conversation_is_left_alone(browser: Browser, served: Served, kept: str) -> None:
    page = visit(browser, served)
    page.evaluate(f"localStorage['edge-memllm-conversation-x'] = {json.dumps(kept)}")
    reload(page, 0)
    chat(page, "One")
    assert texts(page, TITLES) == ["One"]
    assert page.evaluate("localStorage['edge-memllm-conversation-x']") == kept
    assert page.complaints() == []


def test_storage_that_is_full_is_told_of(page: Page) -> None:
    page.evaluate("Storage.prototype.setItem = () => { throw new DOMException('full') }")
    chat(page, "One")
    assert "not kept" in texts(page, "#kept")[0]
    assert len(texts(page, ".entry")) == 1


def test_calls_of_tools_are_shown_and_answered(
    browser: Browser, folder: Path, runtime: SpellingRuntime
) -> None:
    with serving_small(folder, runtime, template=TEMPLATE) as served:
        page = visit(browser, served)
        scripted = [
            {"content": "Let me see."},
            {
                "tool_calls": [
                    {
                        "index": 0,
                        "id": "c1",
                        "function": {"name": "weather", "arguments": '{"city":'},
                    }
                ]
            },
            {"tool_calls": [{"index": 0, "function": {"arguments": '"<b>"}'}}]},
        ]
        bodies = [
            {"choices": [{"index": 0, "delta": each, "finish_reason": None}]} for each in scripted
        ]
        bodies.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]})
        sent = "".join(f"data: {json.dumps(each)}\n\n" for each in bodies) + "data: [DONE]\n\n"
        page.evaluate(
            f"window.asked = []; window.real = fetch; window.fetch = async (path, options) => {{"
            f"asked.push(JSON.parse(options.body ?? 'null'));"
            f"return path.endsWith('completions') ? new Response({json.dumps(sent)})"
            f" : real(path, options) }}"
        )
        fill(page, "tools", '[{"type": "function", "function": {"name": "weather"}}]')
        ask(page, "Hot?", mode="chat")
        written(page)
        assert texts(page, ".call code") == ["weather"]
        assert texts(page, ".call pre") == ['{\n  "city": "<b>"\n}']
        page.evaluate("document.querySelector('.results textarea').value = '30 degrees'")
        click(page, ".results button")
        written(page, 2)
        first, second = page.evaluate("asked.filter((x) => x?.messages)")
        assert first["tools"] == [{"type": "function", "function": {"name": "weather"}}]
        call = {"name": "weather", "arguments": '{"city":"<b>"}'}
        assert second["messages"][1:] == [
            {
                "role": "assistant",
                "content": "Let me see.",
                "tool_calls": [{"id": "c1", "type": "function", "function": call}],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "30 degrees"},
        ]
        assert "weather gave back 30 degrees" in texts(page, ".asked")
        assert page.complaints() == []


def test_a_model_calls_a_tool_and_reads_what_it_gave(browser: Browser, folder: Path) -> None:
    """As above with the server's own stream: the model writes calls as its template implies."""
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    script = byte_tokenizer().encode(call, special=False)
    runtime = ScriptedRuntime([*script, EOS], prompt_length=2)
    knows_calls = ChatTemplate("ab{# {{ tools | tojson }} <tool_call> #}", {})
    with serving_small(folder, runtime, template=knows_calls, engine={"slots": 1}) as served:
        page = visit(browser, served)
        fill(page, "temperature", "0")
        city = {"type": "object", "properties": {"city": {"type": "string"}}}
        weather = {"type": "function", "function": {"name": "weather", "parameters": city}}
        fill(page, "tools", json.dumps([weather]))
        ask(page, "Hot?", mode="chat", tokens=120)
        written(page)
        assert texts(page, ".call code") == ["weather"]
        assert [json.loads(each) for each in texts(page, ".call pre")] == [{"city": "Rome"}]
        assert "calls tools" in texts(page, ".meta")[0]
        runtime.script = byte_tokenizer().encode("ab", special=False)
        page.evaluate("document.querySelector('.results textarea').value = '30 degrees'")
        fill(page, "max_tokens", "2")
        click(page, ".results button")
        written(page, 2)
        assert texts(page, ".entry > .words")[1] == "ab"
        reload(page, 2)
        assert texts(page, ".call code") == ["weather"]
        assert "weather gave back 30 degrees" in texts(page, ".asked")
        assert page.complaints() == []


def test_tools_that_are_no_list_are_not_sent(page: Page, runtime: SpellingRuntime) -> None:
    fill(page, "tools", '{"name": "weather"}')
    ask(page, "Hot?", mode="chat")
    assert page.evaluate("document.activeElement.name") == "tools"
    assert runtime.steps == []
    fill(page, "tools", "")
