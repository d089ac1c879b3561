"""The Python of docs/embedding.md runs, and its figures are right."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from support import ROOT
from support.checkpoints import MakeArtifact

PAGE = (ROOT / "docs" / "embedding.md").read_text("utf-8")


def test_the_python_of_the_page_runs(
    make_artifact: MakeArtifact,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "artifact").symlink_to(make_artifact())
    monkeypatch.chdir(tmp_path)
    block, *_ = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    exec(compile(block, "embedding.md", "exec"), {})
    assert re.match(r"files: 0 of [\d,]+\n", capsys.readouterr().out)


def test_a_position_takes_what_the_page_says() -> None:
    shape = json.loads((ROOT / "examples" / "tiny-english" / "config.json").read_text("utf-8"))
    parts = ("num_hidden_layers", "num_key_value_heads", "head_dim")
    size = 2 * math.prod(shape[part] for part in parts) * 2  # keys and values in float16
    assert f"{size:,} bytes for tiny-english" in PAGE
