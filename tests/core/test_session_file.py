"""Files of sessions: whole or not at all, for one model only, and never believed."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from edge_memllm import Model, RequestError, Sampling, session_file
from edge_memllm.errors import ArtifactError, CorruptionError, EdgeMemLLMError, StorageError
from edge_memllm.overlays import Edit, OverlaySpec, overlay_of
from edge_memllm.session import Session
from support.overlays import row
from support.small_model import (
    OTHER_IDENTITY,
    SmallArtifact,
    open_small_model,
    write_small_artifact,
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallArtifact:
    return write_small_artifact(tmp_path_factory.mktemp("model") / "artifact")


@pytest.fixture(scope="module")
def model(small: SmallArtifact) -> Iterator[Model]:
    with open_small_model(small.path) as opened:
        yield opened


@pytest.fixture(scope="module")
def saved(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "a.session"
    session(model).save(path)
    return path


def session(model: Model, **options: object) -> Session:
    made = model.session(sampling=Sampling(temperature=0.7, top_k=9), seed=3, **options)
    made.append("Tell me")
    made.generate(max_new_tokens=9, ignore_eos=True)
    return made


def go_on(made: Session) -> tuple[int, ...]:
    made.generate(max_new_tokens=9, ignore_eos=True)
    return made.tokens


def test_a_restored_session_is_the_same(model: Model, tmp_path: Path) -> None:
    first = session(model)
    for path, prepare in (("pending", lambda: None), ("ahead", first.prefill)):
        prepare()
        first.save(tmp_path / path)
        again = model.restore_session(tmp_path / path)
        assert (again.tokens, again.computed) == (first.tokens, first.computed)
        assert (again.sampling, again.seed, again.overlays) == (first.sampling, 3, ())
        assert go_on(again) == go_on(first.fork())


def test_an_empty_session_can_be_saved(model: Model, tmp_path: Path) -> None:
    model.session(seed=1).save(tmp_path / "empty")
    again = model.restore_session(tmp_path / "empty")
    assert (again.tokens, again.computed) == ((), 0)
    assert go_on(again)


def test_other_programs_can_read_it(saved: Path, model: Model) -> None:
    tensors = load_file(saved)
    restored = model.restore_session(saved)
    assert tensors["tokens"].tolist() == list(restored.tokens)
    assert tensors["logits"].size == 0
    assert tensors["states"].shape == (restored.computed,)


def test_the_same_session_gives_the_same_bytes(model: Model, tmp_path: Path, saved: Path) -> None:
    session(model).save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == saved.read_bytes()


def test_only_the_owner_may_read_it(saved: Path) -> None:
    assert stat.S_IMODE(saved.stat().st_mode) == 0o600


def test_a_file_that_is_there_is_kept(model: Model, tmp_path: Path) -> None:
    made = session(model)
    (tmp_path / "a").write_text("dear")
    with pytest.raises(RequestError, match="there is a file already"):
        made.save(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "dear"
    made.save(tmp_path / "a", overwrite=True)
    assert model.restore_session(tmp_path / "a").tokens == made.tokens


def test_what_cannot_be_written_leaves_nothing(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StorageError, match="cannot be written"):
        session(model).save(tmp_path / "no folder" / "a")

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"cannot be written \(No space left"):
        session(model).save(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_another_model_refuses_it(saved: Path, tmp_path: Path) -> None:
    other = write_small_artifact(tmp_path / "other", generation_config__json=b"{}")
    with (
        open_small_model(other.path) as opened,
        pytest.raises(RequestError, match="a session of another export of this model"),
    ):
        opened.restore_session(saved)


def test_a_session_knows_its_model(model: Model, saved: Path) -> None:
    changed = rewritten(saved.read_bytes(), identity=OTHER_IDENTITY)
    with pytest.raises(RequestError, match=r"a session of model sha256:\w{12}, this is sha256:"):
        restore(model, saved.with_name("other"), changed)
    changed = rewritten(saved.read_bytes(), codec="f32")
    with pytest.raises(RequestError, match="its rows were read as f32, here they are read as int8"):
        restore(model, saved.with_name("coarse"), changed)


def test_its_overlays_must_be_loaded_and_the_same(small: SmallArtifact, tmp_path: Path) -> None:
    def overlay(seed: int):
        spec = OverlaySpec.for_model(small.manifest, "a", codec="f32")
        return overlay_of(spec, [Edit(65, 0, "replace", row(seed))])

    with open_small_model(small.path) as model:
        model.add_overlay(overlay(1))
        made = session(model)
        made.save(tmp_path / "a")
        assert go_on(model.restore_session(tmp_path / "a")) == go_on(made)
        model.remove_overlay("a")
        with pytest.raises(RequestError, match="There is no overlay 'a'"):
            model.restore_session(tmp_path / "a")
        model.add_overlay(overlay(2))
        with pytest.raises(RequestError, match="overlay 'a' that is loaded is not the one"):
            model.restore_session(tmp_path / "a")


def test_the_model_is_named_before_its_overlays(model: Model, saved: Path) -> None:
    changed = {"identity": OTHER_IDENTITY, "overlays": ["a"], "digests": ["0" * 64]}
    with pytest.raises(RequestError, match="a session of model"):
        restore(model, saved.with_name("both"), rewritten(saved.read_bytes(), **changed))


def restore(model: Model, path: Path, content: bytes) -> Session:
    path.write_bytes(content)
    return model.restore_session(path)


def rewritten(content: bytes, **changes: object) -> bytes:
    """The file with other values in its header, which is otherwise as it would be written."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    said = json.loads(header["__metadata__"]["session"]) | changes
    header["__metadata__"]["session"] = compact(said)
    data = compact(header).encode()
    room = -(-len(data) // 8) * 8
    return room.to_bytes(8, "little") + data.ljust(room) + content[8 + length :]


def compact(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": 3},
        {"computed": 99},
        {"logits": 300},
        {"draws": ["0" * 32]},
        {"draws": ["0" * 32, "0" * 32]},
        {"seed": -1},
        {"seed": "3"},
        {"sampling": {}},
        {"sampling": {"temperature": -1, "top_k": 0, "top_p": 1, "min_p": 0,
                      "repetition_penalty": 1}},
        {"overlays": ["a"]},
        {"messages": 5},
        {"more": 1},
    ],
    ids=str,
)  # fmt: skip
def test_values_that_cannot_be_are_refused(model: Model, saved: Path, changes: dict) -> None:
    with pytest.raises(EdgeMemLLMError):
        restore(model, saved.with_name("changed"), rewritten(saved.read_bytes(), **changes))


def test_what_is_no_session_is_refused(model: Model, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="the file does not exist"):
        model.restore_session(tmp_path / "none")
    with pytest.raises(ArtifactError, match="not a regular file"):
        model.restore_session(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ArtifactError, match="not a regular file"):
        model.restore_session(tmp_path / "pipe")
    for content in (b"", b"short", b"\xff" * 64, b"\x02" + bytes(7) + b"{}" + bytes(9)):
        with pytest.raises(ArtifactError, match="not a saved session"):
            restore(model, tmp_path / "a", content)


def test_another_version_is_refused(model: Model, saved: Path) -> None:
    content = saved.read_bytes().replace(b'"format_version":"2"', b'"format_version":"3"')
    with pytest.raises(ArtifactError, match="session format version '3', this version reads '2'"):
        restore(model, saved.with_name("new"), content)


def test_a_file_of_the_first_version_is_read(model: Model, saved: Path) -> None:
    """It has no messages, and is otherwise what it is now."""
    content = saved.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    metadata = header["__metadata__"]
    said = json.loads(metadata["session"])
    assert said.pop("messages") == header.pop("messages")["shape"][0] == 0
    metadata |= {"session": compact(said), "format_version": "1", "sha256": "0" * 64}

    def head() -> bytes:
        data = compact(header).encode()
        room = -(-len(data) // 8) * 8
        return room.to_bytes(8, "little") + data.ljust(room)

    metadata["sha256"] = hashlib.sha256(head() + content[8 + length :]).hexdigest()
    again = restore(model, saved.with_name("first"), head() + content[8 + length :])
    assert again.messages == []
    assert go_on(again) == go_on(model.restore_session(saved))


@pytest.mark.parametrize(
    "messages", [[{"role": "user", "content": b"Hi"}], [{"content": "Hi"}], ["Hi"], [{"role": 1}]]
)
def test_messages_that_cannot_be_kept_are_refused(
    model: Model, tmp_path: Path, messages: list
) -> None:
    made = session(model)
    made.messages = messages
    with pytest.raises(RequestError, match=r"messages are no JSON that can be kept: .*Keep texts"):
        made.save(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"messages": "Hello, this"}', "message 0 is no object with a role"),
        (b'{"messages": [{"role": 1}]}', "message 0 is no object with a role"),
        (b'{"messages": [{"role":"a"}', "not valid JSON"),
        (b'{"others": [{"role": "us"}]', "not valid JSON"),
    ],
)
def test_messages_of_a_file_are_not_believed(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: bytes, message: str
) -> None:
    made = session(model)
    monkeypatch.setattr(session_file, "_as_json", lambda _: text)
    made.save(tmp_path / "a")
    with pytest.raises(ArtifactError, match=message):
        model.restore_session(tmp_path / "a")


def test_damage_is_found(model: Model, saved: Path) -> None:
    content = bytearray(saved.read_bytes())
    for change in (content[:-1], content + b"x"):
        with pytest.raises(CorruptionError, match=f"{len(change)} bytes, expected {len(content)}"):
            restore(model, saved.with_name("cut"), bytes(change))
    content[-1] ^= 1
    with pytest.raises(CorruptionError, match="its sha256 is another one"):
        restore(model, saved.with_name("flipped"), bytes(content))


def test_tokens_outside_the_vocabulary_are_refused(
    model: Model, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = session(model)
    made._tokens[0] = 9999
    made.save(saved.with_name("wild"))
    with pytest.raises(RequestError, match="token 0 is 9999"):
        model.restore_session(saved.with_name("wild"))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_change_is_refused(model: Model, saved: Path, data: st.DataObject) -> None:
    content = bytearray(saved.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    if bytes(content) == saved.read_bytes():
        return
    with pytest.raises(EdgeMemLLMError):
        restore(model, saved.with_name("fuzzed"), bytes(content))


def test_arrays_come_back_exactly(model: Model) -> None:
    made = session(model)
    held = made._feeder.cache.state(0)
    fork = made.fork()
    for name, array in fork._feeder.cache.state(0).items():
        np.testing.assert_array_equal(array, held[name])
