"""Opening a tokenizer.json: what it says of cutting, padding and chance does not hold here."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers

from edge_memllm.artifact.atomic import WholeFile
from edge_memllm.errors import ArtifactError, RecipeError
from edge_memllm.modeling.data import given_tokenizer, read_tokenizer, write_tokens
from edge_memllm.text.tokenization import Tokenizer
from edge_memllm.text.tokenizer_file import MAX_TOKENIZER_BYTES, library_errors, open_tokenizer
from support.checkpoints import raw_byte_tokenizer

Fields = dict[str, Any]
TEXT = "the theatre then thaws " * 40


def merging() -> Library:
    """A tokenizer with merges, which dropout leaves out by chance."""
    vocabulary = {letter: i for i, letter in enumerate("aehnrstw")} | {"th": 8, "the": 9}
    library = Library(models.BPE(vocabulary, [("t", "h"), ("th", "e")]))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return library


def changed(change: Callable[[Fields], None]) -> bytes:
    fields: Fields = json.loads(merging().to_str())
    change(fields)
    return json.dumps(fields).encode()


def cut(fields: Fields) -> None:
    fields["truncation"] = {
        "direction": "Right",
        "max_length": 5,
        "strategy": "LongestFirst",
        "stride": 0,
    }


def padded(fields: Fields) -> None:
    fields["padding"] = {
        "strategy": {"Fixed": 999},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "a",
    }


def by_chance(fields: Fields) -> None:
    fields["model"]["dropout"] = 0.5


@pytest.mark.parametrize("change", [cut, padded, by_chance])
def test_a_text_is_encoded_whole_and_for_sure(
    change: Callable[[Fields], None], tmp_path: Path
) -> None:
    plain = Tokenizer(changed(lambda _: None)).encode(TEXT)
    definition = changed(change)
    tokenizer = Tokenizer(definition)
    assert tokenizer.encode(TEXT) == plain
    assert open_tokenizer(tokenizer.definition.encode()).to_str() == merging().to_str()

    path = tmp_path / "tokenizer.json"
    path.write_bytes(definition)
    with WholeFile(tmp_path / "tokens.npy") as file:
        count = write_tokens([TEXT], read_tokenizer(path), 0, file)
    assert count == 1 + len(plain)


@pytest.mark.parametrize("length", [1, 4096, 4097, 20_000])
def test_long_texts_have_the_same_ids(length: int) -> None:
    text = (TEXT * 30)[:length]
    assert Tokenizer(changed(cut)).encode(text) == merging().encode(text).ids


def test_other_threads_go_on_while_a_long_text_is_encoded() -> None:
    library = raw_byte_tokenizer()
    tokenizer = Tokenizer(library.to_str().encode())
    beats: list[float] = []
    done = threading.Event()

    def beat() -> None:
        while not done.wait(0.001):
            beats.append(time.perf_counter())

    thread = threading.Thread(target=beat)
    thread.start()
    begin = time.perf_counter()
    tokenizer.encode("a river " * 200_000)
    end = time.perf_counter()
    done.set()
    thread.join()
    times = [begin, *(each for each in beats if begin < each < end), end]
    longest = max(later - sooner for sooner, later in pairwise(times))
    # The list of ids is made while the interpreter is held.
    assert longest < (end - begin) / 2


def test_a_panic_of_the_library_is_an_error_of_ours() -> None:
    strip = {"type": "Strip", "content": "t", "start": 3, "stop": 3}
    tokenizer = Tokenizer(changed(lambda fields: fields.update(decoder=strip)))
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: fails to decode tokens \(.*index"):
        tokenizer.decode([6, 6, 0])


def test_a_failure_of_the_library_is_an_error_of_ours() -> None:
    tokenizer = Tokenizer(changed(lambda fields: fields["model"].update(unk_token="zz")))
    for text in ("x", "x" * 5000):
        with pytest.raises(ArtifactError, match=r"tokenizer\.json: fails to encode.*zz"):
            tokenizer.encode(text)


def test_an_interruption_is_not_taken_for_a_failure() -> None:
    with pytest.raises(KeyboardInterrupt), library_errors("never said"):
        raise KeyboardInterrupt


def test_a_huge_file_is_refused_unread() -> None:
    with pytest.raises(ArtifactError, match=r"^x: 67108865 bytes of JSON, the limit is 67108864"):
        open_tokenizer(b"[" * (MAX_TOKENIZER_BYTES + 1), "x")


def test_a_tokenizer_for_training_is_refused_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(RecipeError, match=r"tokenizer\.json: cannot be read \(No such file"):
        read_tokenizer(path)
    path.write_text("{}")
    with pytest.raises(RecipeError, match=r"tokenizer\.json: not a tokenizer that tokenizers"):
        read_tokenizer(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(RecipeError, match=r"tokenizer\.json: this is a Git LFS pointer"):
        read_tokenizer(path)
    path.write_bytes(changed(lambda _: None))
    with pytest.raises(RecipeError, match="has no <|endoftext|> token".replace("|", r"\|")):
        given_tokenizer(path)
