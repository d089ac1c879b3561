"""What export says of tokenizer, chat template and generation configuration, before any work."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from edge_memllm.errors import ExportError
from edge_memllm.text import GENERATION_FILE, TOKENIZER_FILE
from edge_memllm_export import export_model
from edge_memllm_export.checkpoint import Checkpoint
from edge_memllm_export.text_files import check_text_files
from support.checkpoints import BOS, EOS, PAD, VOCABULARY, change_config

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


def notes(checkpoint: Path) -> tuple[str, ...]:
    return check_text_files(Checkpoint.open(checkpoint))


def generation(checkpoint: Path, **fields: Any) -> None:
    path = checkpoint / "generation_config.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(old | fields))


def test_there_is_nothing_to_say_of_usual_files(checkpoint: Path) -> None:
    generation(checkpoint, do_sample=True, temperature=0.7, top_k=20, pad_token_id=PAD)
    generation(checkpoint, use_cache=True, num_beams=1, typical_p=1.0, transformers_version="5.0")
    generation(checkpoint, output_scores=True, suppress_tokens=None, max_length=20)
    assert notes(checkpoint) == ()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"do_sample": True, "top_p": 0.0}, r"generation_config\.json: top_p is 0\.0, expected"),
        ({"do_sample": True, "temperature": -1}, r"generation_config\.json: temperature is -1"),
        ({"do_sample": True, "top_k": 1.5}, r"generation_config\.json: top_k is 1\.5"),
        ({"repetition_penalty": 0}, r"generation_config\.json: repetition_penalty is 0"),
        (
            {"eos_token_id": [EOS, 151_645]},
            r"generation_config\.json: eos_token_id: token 1 is 1516",
        ),
        ({"eos_token_id": -1}, r"generation_config\.json: eos_token_id: token 0 is -1"),
        ({"eos_token_id": "</s>"}, r"generation_config\.json: eos_token_id: token 0 is '</s>'"),
    ],
)
def test_what_could_not_be_loaded_is_refused_before_any_work(
    checkpoint: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    generation(checkpoint, **fields)
    stages: list[str] = []
    with pytest.raises(ExportError, match=message):
        export_model(checkpoint, tmp_path / "out", progress=lambda stage, *_: stages.append(stage))
    assert not stages
    assert not (tmp_path / "out").exists()


def test_an_end_beyond_the_vocabulary_is_said_of_the_file_that_has_it(checkpoint: Path) -> None:
    change_config(checkpoint, eos_token_id=VOCABULARY)
    (checkpoint / "generation_config.json").unlink(missing_ok=True)
    with pytest.raises(ExportError, match=rf"config\.json: eos_token_id: token 0 is {VOCABULARY}"):
        notes(checkpoint)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("chat_template.jinja", "{% nonsense %}", "chat template: not valid Jinja"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat template: a int, expected"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json: found a list"),
        ("tokenizer.json", "{}", r"tokenizer\.json: not a tokenizer that"),
        ("tokenizer.json", POINTER, r"tokenizer\.json: this is a Git LFS pointer"),
        ("generation_config.json", "{", r"generation_config\.json"),
    ],
)
def test_broken_files_are_refused_first_of_all(
    checkpoint: Path, tmp_path: Path, name: str, content: str, message: str
) -> None:
    (checkpoint / name).write_text(content)
    stages: list[str] = []
    with pytest.raises(ExportError, match=message):
        export_model(checkpoint, tmp_path / "out", progress=lambda stage, *_: stages.append(stage))
    assert not stages


def test_what_is_not_followed_is_named(checkpoint: Path) -> None:
    generation(checkpoint, suppress_tokens=[5], no_repeat_ngram_size=3, bad_words_ids=[[5]])
    generation(checkpoint, max_new_tokens=7, typical_p=0.5, num_beams=4, of_its_own=1)
    (note,) = notes(checkpoint)
    assert note == (
        "generation_config.json: bad_words_ids, max_new_tokens, no_repeat_ngram_size, num_beams, "
        "of_its_own, suppress_tokens, typical_p are not followed by an artifact."
    )


def test_templates_that_are_not_carried_over_are_named(checkpoint: Path) -> None:
    (checkpoint / "additional_chat_templates").mkdir()
    (checkpoint / "chat_template.json").write_text("{}")
    first, second = notes(checkpoint)
    assert first.startswith("chat_template.json: not carried over")
    assert second.startswith("additional_chat_templates: not carried over")


def test_an_end_that_only_the_tokenizer_knows_is_named(checkpoint: Path) -> None:
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<s>"}))
    (note,) = notes(checkpoint)
    assert note.startswith(f"tokenizer_config.json: token {BOS}, <s>, ends a text there and not")
    generation(checkpoint, eos_token_id=[EOS, BOS])
    assert notes(checkpoint) == ()


def test_an_end_that_only_the_template_knows_is_named(checkpoint: Path) -> None:
    generation(checkpoint, eos_token_id=BOS)
    (checkpoint / "chat_template.jinja").write_text("{{ messages[0].content }}</s><|im_end|>")
    (note,) = notes(checkpoint)
    assert note.startswith(f"the chat template: token {EOS}, </s>, ends a text there and not")


def test_notes_are_part_of_the_report(checkpoint: Path, tmp_path: Path) -> None:
    from edge_memllm.cli.export import as_dict, page

    generation(checkpoint, num_beams=4)
    report = export_model(checkpoint, tmp_path / "out", graph_weights="fp32", verify=False)
    assert "note: generation_config.json: num_beams is not followed" in page(report)
    assert as_dict(report)["notes"] == list(report.notes)


def test_too_short_a_text_does_not_judge(checkpoint: Path, tmp_path: Path) -> None:
    short = {"graph_weights": "fp32", "quality_text": "a river " * 10}
    with pytest.raises(ExportError, match="gives 80 tokens, at least 128 are needed: on fewer"):
        export_model(checkpoint, tmp_path / "out", **short)
    report = export_model(checkpoint, tmp_path / "out", **short, accept_quality_loss=True)
    assert report.quality is None
    assert report.rungs


@pytest.mark.parametrize("name", [GENERATION_FILE, TOKENIZER_FILE])
def test_a_file_that_cannot_be_read_is_named(
    name: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.read_bytes

    def failing(path: Path) -> bytes:
        if path.name == name:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path)

    source = Checkpoint.open(checkpoint)
    monkeypatch.setattr(Path, "read_bytes", failing)
    with pytest.raises(ExportError, match=rf"{name}: cannot be read \(Input/output error\)"):
        check_text_files(source)
