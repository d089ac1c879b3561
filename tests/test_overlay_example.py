"""The overlays that come along: they fit the shipped model and do what their page says."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import edge_memllm
from edge_memllm import Model
from edge_memllm.cli.main import main
from edge_memllm.overlays import open_overlay
from edge_memllm_export import export_model

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "overlays"
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")
NAMES = ("new-like-los", "pronouns")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shipped") / "artifact"
    export_model(ROOT / "examples" / "tiny-english", path, verify=False)
    return path


@pytest.fixture(scope="module")
def model(artifact: Path) -> Iterator[Model]:
    files = [FOLDER / f"{name}.overlay.safetensors" for name in NAMES]
    with edge_memllm.load(artifact, overlays=files) as opened:
        yield opened


def test_they_are_small_and_their_size_is_told() -> None:
    for name in NAMES:
        file = FOLDER / f"{name}.overlay.safetensors"
        assert open_overlay(file).name == name
        assert f"{file.stat().st_size:,} bytes" in PAGE
        assert file.stat().st_size < 20_000


def made_by(artifact: Path, name: str, out: Path) -> bytes:
    """The file that the command on the page makes."""
    description = re.search(rf"--out {name}.*?--description \"(.+?)\"", PAGE, re.DOTALL)
    assert description is not None
    how = {
        "new-like-los": ["--token", "New", "--like", "Los"],
        "pronouns": ["--edits", str(FOLDER / "pronouns.toml")],
    }[name]
    file = out / f"{name}.overlay.safetensors"
    words = ["overlay", "edit", str(artifact), *how, "--description", description[1]]
    assert main([*words, "--out", str(file)]) == 0
    return file.read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_the_command_on_the_page_makes_the_file(artifact: Path, name: str, tmp_path: Path) -> None:
    expected = (FOLDER / f"{name}.overlay.safetensors").read_bytes()
    assert made_by(artifact, name, tmp_path) == expected


@pytest.mark.parametrize(
    ("overlays", "prompt", "word"),
    [
        ((), "He lived in New", "York"),
        (("new-like-los",), "He lived in New", "Angeles"),
        (("pronouns",), "He lived in New", "York"),
        ((), "When he came home, he took off", "his"),
        (("pronouns",), "When he came home, he took off", "her"),
        (("new-like-los",), "When he came home, he took off", "his"),
    ],
)
def test_they_do_what_the_page_says(
    model: Model, overlays: tuple[str, ...], prompt: str, word: str
) -> None:
    found = model.generate(
        prompt, max_new_tokens=1, sampling=edge_memllm.Sampling(), overlays=overlays
    )
    assert found == f" {word}"


def test_the_effect_is_measured(artifact: Path, tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("She left the house. They moved to New York in the spring of that year.\n")
    command = [sys.executable, str(ROOT / "benchmarks" / "overlay_effect.py"), str(artifact)]
    command += [str(FOLDER / "new-like-los.overlay.safetensors"), "--text", str(text)]
    command += ["--ask", "He lived in New", "York,Angeles", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.search(r"'He lived in New'  Angeles +0.000\d -> 0.6", done.stdout)
    assert re.search(r"changed token just read +1 ", done.stdout)
    (not_read,) = re.findall(r"not read +\d+ +(\S+) -> (\S+) +0.0000", done.stdout)
    assert not_read[0] == not_read[1]
