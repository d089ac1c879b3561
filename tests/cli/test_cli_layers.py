"""``edge-memllm layers`` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_memllm.cli.main import main
from support.checkpoints import MakeArtifact, write_dense
from support.gguf_files import byte_tokens, metadata_of, random_model, stored_tensors, write_gguf

TEXT = "The river was wide, and the boats on it were slow. " * 12


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    learned, judged = tmp_path / "learned.txt", tmp_path / "judged.txt"
    learned.write_text(TEXT, "utf-8")
    judged.write_text("A boat is on the wide river, and it is slow there.\n" * 8, "utf-8")
    return ["--data", str(learned), "--valid", str(judged), "--window", "32"]


def test_a_folder_is_measured_layer_by_layer(
    tmp_path: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(write_dense(tmp_path / "dense", "llama"))
    assert main(["layers", folder, *texts, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["layer"] for each in found["layers"]] == [0, 1, 2]
    assert set(found["layers"][0]["damage"]) == {"table", "dropped", "alone"}
    assert found["window"] == 32
    assert main(["layers", folder, *texts]) == 0
    shown = capsys.readouterr().out
    share = found["layers"][0]["token_share"]
    assert f"\n0      {share:.3f}" in shown
    assert "layer  token share  of known  table" in shown


def test_a_gguf_file_is_measured_with_the_texts_that_come_along(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = random_model("llama", vocab_size=258, max_position_embeddings=512)
    metadata = metadata_of("llama", **{"llama.context_length": 512}) | byte_tokens()
    file = write_gguf(tmp_path / "a.gguf", "llama", metadata, stored_tensors("llama", network))
    words = ["--data-tokens", "512", "--valid-tokens", "128", "--window", "32", "--json"]
    assert main(["layers", str(file), *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["judged_tokens"] <= 128
    assert found["model"] == str(file)


def test_a_text_that_judges_itself_is_refused(
    tmp_path: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(write_dense(tmp_path / "dense", "llama"))
    assert main(["layers", folder, "--data", texts[1], "--valid", texts[1]]) == 1
    assert "would judge what was fitted to it" in capsys.readouterr().err.replace("\n", " ")


def test_an_exported_model_is_refused(
    make_artifact: MakeArtifact, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["layers", str(make_artifact(beta=8))]) == 1
    shown = capsys.readouterr().err
    assert "is an exported model" in shown
    assert "Give the checkpoint" in shown


def test_a_checkpoint_without_a_tokenizer_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_dense(tmp_path / "dense", "llama")
    (folder / "tokenizer.json").unlink()
    assert main(["layers", str(folder)]) == 1
    assert "no tokenizer.json, so no text can be read" in capsys.readouterr().err
