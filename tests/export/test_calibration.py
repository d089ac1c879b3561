"""Windows of the texts that matrices are calibrated on."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Definition
from tokenizers.processors import TemplateProcessing

from edge_memllm.text.tokenization import Tokenizer
from edge_memllm_export.checkpoint import Checkpoint
from edge_memllm_export.texts import conversations, text_windows
from edge_memllm_export.weights.calibration import calibration_windows
from support.checkpoints import BOS, MakeCheckpoint

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def with_beginning(folder: Path) -> None:
    """Have the tokenizer put a first token before every text."""
    file = folder / "tokenizer.json"
    definition = Definition.from_file(str(file))
    first = definition.id_to_token(BOS)
    definition.post_processor = TemplateProcessing(
        single=f"{first} $A", special_tokens=[(first, BOS)]
    )
    definition.save(str(file))


@given(
    st.lists(st.integers(5, 9), min_size=1, max_size=40),
    st.integers(3, 12),
    st.sampled_from([[], [1], [1, 2]]),
    st.booleans(),
)
def test_windows_hold_the_text_and_begin_as_texts_do(
    tokens: list[int], longest: int, beginning: list[int], given_with_it: bool
) -> None:
    whole = beginning + tokens if given_with_it else tokens
    found = text_windows(whole, longest, beginning)
    assert all(each[: len(beginning)] == beginning and len(each) <= longest for each in found)
    assert [token for each in found for token in each[len(beginning) :]] == tokens


def test_a_tokenizer_says_how_its_texts_begin(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint()
    assert Tokenizer((folder / "tokenizer.json").read_bytes()).beginning == []


def test_every_window_of_calibration_begins_as_texts_do(checkpoint: Path) -> None:
    with_beginning(checkpoint)
    tokenizer = Tokenizer((checkpoint / "tokenizer.json").read_bytes())
    assert tokenizer.beginning == [BOS]
    windows = calibration_windows(Checkpoint.open(checkpoint), None)
    assert len(windows) > 4
    assert all(each[0, 0] == BOS for each in windows)


def test_conversations_go_through_the_model_s_template(checkpoint: Path) -> None:
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    source = Checkpoint.open(checkpoint)
    tokenizer = Tokenizer((checkpoint / "tokenizer.json").read_bytes())
    question, answer = conversations()[-1]  # a short one: bytes are tokens here
    expected = torch.tensor([tokenizer.encode(f"<user>{question}<assistant>{answer}")])
    found = calibration_windows(source, None)
    assert any(torch.equal(each, expected) for each in found)


def test_a_template_that_wants_something_else_is_left_alone(checkpoint: Path) -> None:
    config = {"chat_template": "{{ raise_exception('only one word') }}"}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(config))
    plain = calibration_windows(Checkpoint.open(checkpoint), None)
    (checkpoint / "tokenizer_config.json").unlink()
    assert len(plain) == len(calibration_windows(Checkpoint.open(checkpoint), None))


def test_a_text_of_one_s_own_takes_the_place_of_all(checkpoint: Path) -> None:
    (window,) = calibration_windows(Checkpoint.open(checkpoint), "a text of my own")
    tokenizer = Tokenizer((checkpoint / "tokenizer.json").read_bytes())
    assert window[0].tolist() == tokenizer.encode("a text of my own")
