"""docs/results/paper.md and its pictures, from the stored figures alone; needs no torch."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.paper.page.ablations import ablations_section
from benchmarks.paper.page.decode import decode_section
from benchmarks.paper.page.gain import gain_section
from benchmarks.paper.page.lacking import lacking_section
from benchmarks.paper.page.layers import layers_section
from benchmarks.paper.page.layout import Entries, Section, console, table
from benchmarks.paper.page.longer import longer_section
from benchmarks.paper.page.quality import quality_section
from benchmarks.paper.page.stored import bits_section, rank_section, ratio_section
from benchmarks.paper.store import FOLDER, Results

PAGE = FOLDER.parent / "paper.md"
IMAGES = FOLDER.parents[1] / "images"

_HEAD = """\
# The paper in small

Tables and figures of *MemoryLLM: Plug-n-Play Interpretable Feed-Forward Memory for Transformers*
(arXiv 2602.00398), measured on models that train on a CPU: {shape}, against 1B and 25 to 150
billion tokens of C4. Orderings and shapes can be compared with the paper's, figures cannot. All
figures of ours, and the verdicts, are written from [the stored results](paper); what was not
measured says so.
"""
_COMMANDS = (
    "python -m benchmarks.paper measure RUNS --data DATA    # what is missing, of all runs in RUNS",
    "python -m benchmarks.paper decode --preset 250m --artifacts FOLDER --cache cold",
    "python -m benchmarks.paper page                        # this page and its pictures",
)
_METHOD = """\
RUNS holds a folder NAME-sSEED for each model, trained by the commands in the first table. Every
model is exported with matrices and table in float32, so that no rounding is in the figures, and
judged by `edge_memllm.perplexity` and `edge_memllm.evaluation`, in windows as long as the
training's sequences that advance by half of that: on the validation parts of the two corpora
(*together*: both), 400,000 characters of each, and as much of Wikitext-2, which is of another kind.
The sweeps, on runs of the first seed, read 120,000 characters of each corpus. DATA holds the files
that `benchmarks/paper/judging.py` names.
"""


def write_page(*, check: bool) -> int:
    """Write page and pictures, or with `check` return 1 when they are not what they would be."""
    wanted = page_files()
    if not check:
        for path, text in wanted.items():
            path.write_text(text, encoding="utf-8")
        return 0
    wrong = [path.name for path, text in wanted.items() if not _is(path, text)]
    if wrong:
        words = f"{', '.join(wrong)}: not of today, run `python -m benchmarks.paper page`."
        print(words, file=sys.stderr)
    return 1 if wrong else 0


def page_files(folder: Path = FOLDER) -> Mapping[Path, str]:
    """Return the text of every file by its path, from the stored figures of a folder."""
    stored = {
        name: Results(name, folder).all()
        for name in ("perplexity", "gain", "drop", "bits", "rank", "decode")
    }
    parts = [
        quality_section(stored["perplexity"]),
        longer_section(stored["perplexity"]),
        gain_section(stored["gain"]),
        layers_section(stored["drop"]),
        bits_section(stored["bits"]),
        rank_section(stored["rank"]),
        decode_section(stored["decode"]),
        ratio_section(stored["perplexity"]),
        ablations_section(stored["perplexity"]),
        lacking_section(FOLDER.parent),
    ]
    pictures = {IMAGES / name: svg for part in parts for name, svg in part.pictures.items()}
    return {PAGE: _page(_shape(stored["perplexity"]), parts), **pictures}


def _page(shape: str, parts: Sequence[Section]) -> str:
    claims = [claim for part in parts for claim in part.claims]
    rows = [[claim.paper, claim.here, claim.verdict] for claim in claims]
    blocks = [
        _HEAD.format(shape=shape),
        f"{console(*_COMMANDS)}\n\n{_METHOD}",
        f"## What agrees\n\n{table(['the paper', 'here', 'agrees'], rows)}\n",
        *map(_block, parts),
    ]
    return "\n".join(blocks)


def _block(part: Section) -> str:
    command = ""
    if part.measured is not None:
        words = f"python -m benchmarks.paper measure RUNS --data DATA --only {part.measured}"
        command = f"\n{console(words)}\n"
    return f"## {part.title}\n\n{part.text}\n{command}"


def _shape(entries: Entries) -> str:
    """What was trained, in words; all runs but the smaller ones are of one shape."""
    if not entries:
        return "none yet"
    largest = max(entries.values(), key=lambda each: each["model"]["total"])
    model, tokens = largest["model"], largest["figures"]["tokens_seen"]
    return (
        f"{model['layers']} layers of width {model['width']}, a vocabulary of "
        f"{model['vocabulary']:,}, {tokens / 1e6:.1f} million tokens of Wikipedia and novels"
    )


def _is(path: Path, text: str) -> bool:
    return path.exists() and path.read_text("utf-8") == text
