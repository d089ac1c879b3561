"""The documents are true: commands parse, links lead somewhere, names exist, examples run."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from edge_memllm import __version__
from edge_memllm.cli.main import build_parser
from support import ROOT
from support.checkpoints import MakeArtifact
from support.documents import BLOCK, commands, parses, words_of

PAGES = sorted(
    path
    for folder in (
        ".",
        "docs",
        "docs/results",
        "examples",
        "examples/tiny-english",
        "examples/overlays",
        "examples/desktop",
        "benchmarks",
        "kernels",
    )
    for path in (ROOT / folder).glob("*.md")
)
README = (ROOT / "README.md").read_text("utf-8")

_LINK = re.compile(r"\]\(([^)\s]+)\)")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def all_commands() -> list[pytest.ParameterSet]:
    return [
        pytest.param(command, id=f"{named(page)}: {command}")
        for page in PAGES
        for command in dict.fromkeys(commands(page.read_text("utf-8")))
        if not command.startswith("accelerate")
    ]


@pytest.mark.parametrize("command", all_commands())
def test_a_command_in_a_document_is_one_that_exists(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = words_of(command)
    if command.startswith("make "):
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
        assert words[0] in targets
    elif len(words) == 1 and words[0].isalpha():  # a command named in running text
        assert f"usage: edge-memllm {words[0]}" in help_of(words[0], capsys)
    else:
        assert parses(words), capsys.readouterr().err


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        build_parser().parse_args([command, "--help"])
    return capsys.readouterr().out


def test_there_are_commands_to_check() -> None:
    assert len(all_commands()) > 40


def test_wrong_commands_are_found() -> None:
    page = "```console\nedge-memllm run a --colour red && make tea\n```\n`edge-memllm sing`"
    found = list(commands(page))
    assert found == ["edge-memllm run a --colour red", "make tea", "edge-memllm sing"]
    assert not parses(words_of(found[0]))


def test_the_command_page_is_the_help_of_today(monkeypatch: pytest.MonkeyPatch) -> None:
    module = runpy.run_path(str(ROOT / "docs" / "cli_reference.py"))
    assert module["reference"]() == (ROOT / "docs" / "cli.md").read_text("utf-8"), "make docs"
    monkeypatch.setattr("sys.argv", ["cli_reference.py", "--check"])
    assert module["main"]() == 0


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_relative_link_leads_to_a_file(page: Path) -> None:
    for target in _LINK.findall(page.read_text("utf-8")):
        if not target.startswith(("http://", "https://", "#")):
            path = page.parent / target.partition("#")[0]
            assert path.exists(), target


def test_links_to_headings_lead_to_headings() -> None:
    for page in PAGES:
        for target in _LINK.findall(page.read_text("utf-8")):
            name, _, anchor = target.partition("#")
            if anchor and not target.startswith("http"):
                goal = (page.parent / name if name else page).read_text("utf-8")
                titles = re.findall(r"^#+ (.*)$", goal, re.MULTILINE)
                assert anchor in {
                    re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles
                }


def test_the_python_of_the_readme_runs(
    make_artifact: MakeArtifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "artifact").symlink_to(make_artifact())
    monkeypatch.chdir(tmp_path)
    blocks = [block for language, block in BLOCK.findall(README) if language == "python"]
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_the_changelog_speaks_of_this_version() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text("utf-8")
    newest = re.search(r"^## (\d+\.\d+\.\d+)", changes, re.MULTILINE)
    assert newest is not None
    assert newest[1] == __version__


def test_the_readme_stays_short() -> None:
    assert len(README.splitlines()) <= 130
