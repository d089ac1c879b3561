from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge_memllm.errors import RequestError
from edge_memllm.text.tokenization import MAX_STOP_CHARACTERS, MAX_STOPS, StopMatcher, check_stops

LETTERS = st.text("ab\n", max_size=24)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4)


def cut_at_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """The rule in its plainest form: the first end of a stop string, the longest one there."""
    for end in range(1, len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return text[: end - max(lengths)], True
    return text, False


@given(st.lists(LETTERS, max_size=8), STOPS)
@example(["xab", "a"], ["aba"])
@example(["abab", "b"], ["ababb", "abb"])
def test_shown_text_ends_before_the_first_stop_however_it_is_cut(
    pieces: list[str], stops: list[str]
) -> None:
    matcher = StopMatcher(stops)
    shown = "".join(matcher.push(piece) for piece in pieces)
    shown += matcher.flush()
    assert (shown, matcher.stopped) == cut_at_stop("".join(pieces), stops)


@given(LETTERS, STOPS)
def test_only_text_that_may_become_a_stop_is_held_back(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = matcher.push(text)
    if not matcher.stopped:
        prefixes = {stop[:end] for stop in stops for end in range(len(stop))} | {""}
        held = max((p for p in prefixes if text.endswith(p)), key=len)
        assert shown + held == text


def test_nothing_is_shown_after_a_stop() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("one E") == "one "
    assert matcher.push("ND two") == ""
    assert matcher.push("three") == ""
    assert matcher.flush() == ""
    assert matcher.stopped


def test_a_long_stop_string_over_long_text_takes_linear_time() -> None:
    matcher = StopMatcher(["a" * MAX_STOP_CHARACTERS])
    text = ("a" * (MAX_STOP_CHARACTERS - 1) + "b") * 50
    assert matcher.push(text) == text


def test_one_string_stands_for_itself() -> None:
    assert check_stops("stop") == ("stop",)
    assert check_stops(["a", "b"]) == ("a", "b")
    assert check_stops(()) == ()


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        ("", "a stop string has 0 characters, expected 1 to 4096"),
        (["a", ""], "has 0 characters"),
        ("x" * (MAX_STOP_CHARACTERS + 1), "has 4097 characters"),
        (["a"] * (MAX_STOPS + 1), "65 stop strings were given, expected at most 64"),
        (["a", 1], "stop holds 1, expected strings only"),
    ],
)
def test_wrong_stop_strings_are_refused(stop: list[str], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        check_stops(stop)
