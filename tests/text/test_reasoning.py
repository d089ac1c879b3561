"""Reasoning told apart from the answer, however the reply is cut into pieces."""

from __future__ import annotations

from itertools import groupby

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_memllm.text.reasoning import Reasoning, ReasoningMarks, ReasoningParser, reasoning_of

MARKS = ReasoningMarks("<think>", "</think>")
CASES = [
    (False, "<think>\nwhy?\n</think>\n\nSo.", "why?", "So."),
    (False, " \n<think>why\n\nnot</think> So. ", "why\n\nnot", "So. "),
    (True, "\nwhy?\n</think>\n\nSo.", "why?", "So."),
    (True, "cut off </thi", "cut off </thi", ""),
    (True, "a </ b </thinking </think> c </think> d", "a </ b </thinking", "c </think> d"),
    (True, "</think>So.", "", "So."),
    (False, "So <think>no</think>", "", "So <think>no</think>"),
    (False, "<thin air", "", "<thin air"),
    (False, "  <thin", "", "  <thin"),
    (False, "<think></think>", "", ""),
    (False, "", "", ""),
]


def read(begun: bool, pieces: list[str]) -> tuple[str, str]:
    parser = ReasoningParser(Reasoning(MARKS, begun))
    said = [each for piece in pieces for each in parser.push(piece)] + parser.flush()
    assert all(each.text for each in said)
    kinds = [kind for kind, _ in groupby(each.reasoned for each in said)]
    assert kinds == sorted(kinds, reverse=True)  # the answer comes behind
    parts = [[each.text for each in said if each.reasoned is kind] for kind in (True, False)]
    return "".join(parts[0]), "".join(parts[1])


@pytest.mark.parametrize(("begun", "text", "reasoning", "answer"), CASES)
def test_a_reply_is_reasoning_and_an_answer(
    begun: bool, text: str, reasoning: str, answer: str
) -> None:
    assert read(begun, [text]) == (reasoning, answer)
    assert read(begun, [*text]) == (reasoning, answer)


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(
    begun=st.booleans(),
    pieces=st.lists(
        st.sampled_from(
            ["<think>", "</think>", "<", "/th", "ink>", "</thi", " ", "\n", "why", "So"]
        )
    ),
)
def test_how_it_is_cut_changes_nothing(begun: bool, pieces: list[str]) -> None:
    text = "".join(pieces)
    assert read(begun, pieces) == read(begun, [text]) == read(begun, [*text])


def test_the_template_and_the_prompt_tell_how_replies_are_read() -> None:
    source = "{{ message.content.split('</think>') }}"
    assert reasoning_of(source, "assistant\n") == Reasoning(MARKS, False)
    assert reasoning_of(source, "assistant\n<think>\n") == Reasoning(MARKS, True)
    assert reasoning_of(source, "<think>\n\n</think>\n\n") == Reasoning(MARKS, False)
    mistral = reasoning_of("[THINK] [/THINK]", "[THINK]")
    assert mistral == Reasoning(ReasoningMarks("[THINK]", "[/THINK]"), True)
    assert reasoning_of("{{ messages }}", "<think>") is None
    assert reasoning_of(None, "") is None
