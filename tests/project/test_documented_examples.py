"""Every example of the documents and of the help runs as it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edge_memllm.cli.main import build_parser
from support.documents import (
    NOT_RUN,
    PAGES,
    ROOT,
    Workplace,
    commands_of,
    examples_of_page,
    fill_stock,
    helps,
    shell_words,
)

EXAMPLES = {
    **{
        str(page.relative_to(ROOT)): list(examples_of_page(page.read_text("utf-8")))
        for page in PAGES
    },
    **{f"{name} --help": list(commands_of(text)) for name, text in helps()},
}
RUN = {
    name: [each for each in found if each.not_run is None]
    for name, found in EXAMPLES.items()
    if any(each.not_run is None for each in found)
}


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stock")
    fill_stock(folder)
    return folder


def end_at_once(server: Any, **_: Any) -> None:
    """What a server does that is told to end before anybody asks."""
    assert server._models.close(10)


@pytest.fixture
def workplace(stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    """Where examples are over in moments: short texts to measure on, and no listening."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGE_MEMLLM_HOME", str(tmp_path / "cache"))
    for name in ("weights.kv_steps", "weights.calibration"):
        monkeypatch.setattr(f"edge_memllm_export.{name}._TOKENS", 256)
    for module in ("edge_memllm_export.judging.quality", "edge_memllm.mixed_precision.sensitivity"):
        monkeypatch.setattr(f"{module}._MOST_TOKENS", 256)
        monkeypatch.setattr(f"{module}._FEWEST_TOKENS", 256)
    monkeypatch.setattr("edge_memllm.modeling.fitting._STEPS", 20)
    monkeypatch.setattr("edge_memllm.server.server.Server.run", end_at_once)
    return Workplace(tmp_path, stock)


@pytest.mark.filterwarnings("ignore")  # Trainer's own
@pytest.mark.parametrize("name", RUN)
def test_the_examples_run_as_written(name: str, workplace: Workplace) -> None:
    for example in RUN[name]:
        workplace.run(example)


def test_what_is_not_run_parses_and_has_a_reason() -> None:
    reasons = set()
    for example in (each for found in EXAMPLES.values() for each in found):
        if example.not_run is None:
            continue
        reasons.add(example.not_run)
        if example.text.startswith("edge-memllm "):
            build_parser().parse_args(shell_words(example.text)[0][1:])
        elif example.python:
            compile(example.text, "example", "exec")
        elif example.text.startswith("python ") and not example.text.startswith("python -m"):
            assert (ROOT / example.text.split()[1]).is_file()
    assert reasons == set(NOT_RUN.values()), "a reason that nothing needs any more"
