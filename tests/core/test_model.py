from __future__ import annotations

import errno
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_memllm import Model, Piece, RequestError, Sampling
from edge_memllm.errors import EdgeMemLLMError, StorageError
from support.checkpoints import EOS, PAD, VOCABULARY
from support.small_model import (
    ScriptedRuntime,
    byte_tokenizer,
    open_small_model,
    write_small_artifact,
)

PROMPTS = ["one", "and another one", "é"]


def scripted(folder: Path, text: str, *, end: bool = True) -> tuple[Model, ScriptedRuntime]:
    """A model that answers a prompt of one token with `text`."""
    script = byte_tokenizer().encode(text) + ([EOS] if end else [])
    runtime = ScriptedRuntime(script)
    return open_small_model(folder, runtime), runtime


# Text, pieces, statistics


def test_the_text_is_the_pieces_and_the_tokens_decoded(model: Model) -> None:
    pieces = list(model.stream("one", max_new_tokens=20, ignore_eos=True))
    text = "".join(piece.text for piece in pieces)
    assert text == model.generate("one", max_new_tokens=20, ignore_eos=True)
    assert text == model.detokenize(piece.token for piece in pieces)
    assert len(pieces) == 20


def test_only_the_last_piece_has_a_reason_and_statistics(model: Model) -> None:
    *pieces, last = model.stream("one", max_new_tokens=5, ignore_eos=True, seed=11)
    assert all(each.finish_reason is None and each.statistics is None for each in pieces)
    assert last.finish_reason == "length"
    statistics = last.statistics
    assert statistics is not None
    record = model.table.layout.record_bytes
    expected = {
        "prompt_tokens": 3,
        "completion_tokens": 5,
        "table_bytes_read": 7 * record,
        "table_bytes_read_per_token": record,
        "reads_per_token": 1.0,
        "seed": 11,
        "device": "cpu",
        "reader": "pread",
    }
    found = statistics.as_dict()
    assert expected.items() <= found.items()
    assert found["time_to_first_token_seconds"] > 0
    assert found["prefill_tokens_per_second"] > 0
    assert found["decode_tokens_per_second"] > 0
    assert found["kv_bytes"] > 0
    json.dumps(found)


def test_an_end_token_is_not_shown_and_ends_the_text(folder: Path) -> None:
    model, _ = scripted(folder, "née")
    with model:
        pieces = list(model.stream([7]))
    assert [piece.text for piece in pieces] == ["n", "", "é", "e", ""]
    assert pieces[-1].token == EOS
    assert pieces[-1].finish_reason == "stop"


def test_ignoring_the_end_token_goes_on(folder: Path) -> None:
    model, _ = scripted(folder, "ab")
    with model:
        *_, last = model.stream([7], max_new_tokens=6, ignore_eos=True)
    assert last.finish_reason == "length"


def test_half_a_character_at_the_end_is_given_out_at_last(folder: Path) -> None:
    model, _ = scripted(folder, "a🙂", end=False)
    with model:
        pieces = list(model.stream([7], max_new_tokens=3))
    assert [piece.text for piece in pieces] == ["a", "", "\ufffd"]


@settings(max_examples=30, deadline=None)
@given(text=st.text("ab é", min_size=1, max_size=20), stop=st.text("ab é", min_size=1, max_size=3))
def test_text_ends_before_a_stop_string(folder: Path, text: str, stop: str) -> None:
    model, runtime = scripted(folder, text)
    with model:
        pieces = list(model.stream([7], stop=stop))
    before, found, _ = text.partition(stop)
    assert "".join(piece.text for piece in pieces) == before
    assert pieces[-1].finish_reason == "stop"
    assert len(pieces) == len((before + found).encode()) + (not found)
    assert runtime.fed == len(pieces)


@pytest.mark.parametrize(
    "options", [{"stop": "<pad>"}, {"stop": ["zz", "<pad>"]}, {"stop_token_ids": [PAD]}]
)
@pytest.mark.parametrize("ignore_eos", [False, True])
def test_text_ends_at_a_token(folder: Path, options: dict[str, Any], ignore_eos: bool) -> None:
    """Special tokens are no text: a stop string that is one ends the text at the token."""
    model, runtime = scripted(folder, "ab", end=False)
    runtime.script = (*runtime.script, PAD, PAD, PAD)
    with model:
        pieces = list(model.stream([7], **options, ignore_eos=ignore_eos))
        assert [piece.text for piece in pieces] == ["a", "b", ""]
        assert (pieces[-1].token, pieces[-1].finish_reason) == (PAD, "stop")
        assert model.generate([7], **options) == "ab"
        with model.session() as session:
            session.append([7])
            assert session.generate(**options) == "ab"


@pytest.mark.parametrize("ids", [[VOCABULARY], [-1], [True], ["a"]])
def test_stop_tokens_are_of_the_vocabulary(model: Model, ids: list[Any]) -> None:
    with pytest.raises(RequestError, match=r"stop_token_ids: token 0 is .*, expected an integer"):
        model.stream("a", stop_token_ids=ids)


def test_a_list_of_prompts_gives_the_texts_they_have_alone(model: Model) -> None:
    alone = [model.generate(prompt, max_new_tokens=9) for prompt in PROMPTS]
    assert model.generate(PROMPTS, max_new_tokens=9) == alone
    ids = [model.tokenize(prompt) for prompt in PROMPTS]
    assert model.generate(ids, max_new_tokens=9) == alone
    assert model.generate(ids[0], max_new_tokens=9) == alone[0]


def test_equal_prompts_of_a_batch_draw_different_texts(model: Model) -> None:
    texts = model.generate(["one"] * 3, sampling=Sampling(temperature=1.0), seed=3)
    assert len(set(texts)) == 3
    assert texts[0] == model.generate("one", sampling=Sampling(temperature=1.0), seed=3)


def test_a_seed_repeats_a_text_and_the_drawn_one_is_told(model: Model) -> None:
    sampling = Sampling(temperature=1.0)
    *_, last = pieces = list(model.stream("one", sampling=sampling, max_new_tokens=30))
    assert last.statistics is not None
    seed = last.statistics.seed
    text = model.generate("one", sampling=sampling, max_new_tokens=30, seed=seed)
    assert text == "".join(piece.text for piece in pieces)


def test_the_artifact_says_how_to_sample(tmp_path: Path) -> None:
    config = json.dumps({"do_sample": True, "temperature": 0.5, "top_k": 7}).encode()
    made = write_small_artifact(tmp_path / "a", generation_config__json=config)
    with open_small_model(made.path) as model:
        assert model.sampling == Sampling(temperature=0.5, top_k=7)
        assert model.generate("one", seed=1) == model.generate("one", seed=1)
        assert model.generate("one", seed=1) != model.generate("one", seed=2)
        assert model.generate("one", sampling=Sampling()) != model.generate("one", seed=1)


# Life and death


def test_leaving_a_stream_frees_its_cache_and_keeps_the_model(folder: Path) -> None:
    model, runtime = scripted(folder, "abcdef")
    with model:
        stream = model.stream([7])
        next(stream)
        stream.close()
        assert runtime.caches[0].closed
        for _ in model.stream([7]):
            break
        assert runtime.caches[1].closed
        assert model.generate([7]) == "abcdef"


def test_an_interrupt_in_a_step_frees_the_cache_and_keeps_the_model(folder: Path) -> None:
    model, runtime = scripted(folder, "abcdef")
    step = runtime.step

    def interrupted(*arguments: Any, **more: Any) -> Any:
        if runtime.fed == 3:
            raise KeyboardInterrupt
        return step(*arguments, **more)

    with model:
        runtime.step = interrupted  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt) as caught:
            model.generate([7])
        assert runtime.caches[0].closed, caught  # even while the traceback is alive
        runtime.step = step  # type: ignore[method-assign]
        assert model.generate([7]) == "abcdef"


def test_threads_get_what_one_thread_gets(model: Model) -> None:
    jobs = [(PROMPTS[n % 3], n) for n in range(24)]

    def text(job: tuple[str, int]) -> str:
        prompt, seed = job
        return model.generate(prompt, max_new_tokens=30, seed=seed, sampling=Sampling(1.0))

    expected = [text(job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(text, jobs)) == expected


def test_a_closed_model_says_so_and_closes_twice(folder: Path) -> None:
    model = open_small_model(folder)
    stream = model.stream("one")
    model.close()
    model.close()
    with pytest.raises(RequestError, match=r"The model is closed\. Load it again\."):
        model.generate("one")
    with pytest.raises(RequestError, match="The model is closed"):
        next(stream)


def test_a_generation_under_way_ends_well_after_close(folder: Path) -> None:
    model, _ = scripted(folder, "abcdef")
    released = threading.Event()
    model.runtime.close = released.set  # type: ignore[method-assign]
    stream = model.stream([7])
    text = next(stream).text
    model.close()
    assert not released.is_set()
    assert text + "".join(piece.text for piece in stream) == "abcdef"
    assert released.is_set()


def test_a_model_describes_itself(model: Model) -> None:
    found = model.describe()
    assert found["device"] == "cpu"
    assert found["runtime"] == "fake"
    assert found["reader"] == "pread"
    assert found["codec"] == "int8-g32"
    assert found["reader_reason"] == "asked for"
    assert found["memory"] is None  # nothing was planned
    json.dumps(found)


def test_pieces_are_plain_values() -> None:
    assert Piece("a", 3) == Piece("a", 3, None, None)


def test_a_reading_error_ends_one_generation_only(folder: Path) -> None:
    with open_small_model(folder) as model:
        expected = model.generate("one")
        read = model.table._reader.read
        calls = []

        def failing(*arguments: Any) -> int:
            calls.append(1)
            if len(calls) == 4:
                raise StorageError("table.safetensors: reading failed (EIO). " + str(errno.EIO))
            return read(*arguments)

        model.table._reader.read = failing  # type: ignore[method-assign]
        with pytest.raises(EdgeMemLLMError, match="reading failed"):
            model.generate("one")
        assert model.generate("one") == expected
