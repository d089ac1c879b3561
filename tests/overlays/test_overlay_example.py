"""The overlays that come along: they fit the shipped model and do what their page says."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import edge_memllm
from edge_memllm import Model
from edge_memllm.cli.main import main
from edge_memllm.overlays import Overlay, open_overlay
from edge_memllm_export import export_model
from support import ROOT

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


def made_by(artifact: Path, name: str, out: Path) -> Overlay:
    """What the command on the page makes."""
    description = re.search(rf"--out {name}.*?--description \"(.+?)\"", PAGE, re.DOTALL)
    assert description is not None
    how = {
        "new-like-los": ["--token", "New", "--like", "Los"],
        "pronouns": ["--edits", str(FOLDER / "pronouns.toml")],
    }[name]
    file = out / f"{name}.overlay.safetensors"
    words = ["overlay", "edit", str(artifact), *how, "--description", description[1]]
    assert main([*words, "--out", str(file)]) == 0
    return open_overlay(file)


@pytest.mark.parametrize("name", NAMES)
def test_the_command_on_the_page_makes_the_file(artifact: Path, name: str, tmp_path: Path) -> None:
    """But for the last bits of a row, in which processors differ."""
    expected = open_overlay(FOLDER / f"{name}.overlay.safetensors")
    found = made_by(artifact, name, tmp_path)
    assert found.spec == expected.spec
    for one, other in zip(found.edits(), expected.edits(), strict=True):
        assert (one.token, one.layer) == (other.token, other.layer)
        assert (one.operation, one.factor) == (other.operation, other.factor)
        assert (one.row is None) == (other.row is None)
        if one.row is not None and other.row is not None:
            step = np.abs(other.row).max() / 127
            np.testing.assert_allclose(one.row, other.row, rtol=0.001, atol=1.01 * step)


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
