"""docs/results/paper.md and its pictures, from the stored figures alone; needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.generated import write_files
from benchmarks.paper.layout import (
    MISSING,
    TABLE_6,
    VARIANTS,
    Claim,
    Entries,
    Section,
    change,
    console,
    table,
)
from benchmarks.paper.one_budget import one_budget_section
from benchmarks.paper.quality import ablations_section, longer_section, quality_section
from benchmarks.paper.store import FOLDER, Results
from benchmarks.paper.sweeps import (
    bits_section,
    gain_section,
    layers_section,
    rank_section,
    ratio_section,
)

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
    "python -m benchmarks.paper train RUNS --data DATA --steps 2100    # hours; stop it, go on",
    "python -m benchmarks.paper measure RUNS --data DATA    # what is missing, of all runs in RUNS",
    "python -m benchmarks.paper decode --preset 250m --artifacts FOLDER --cache cold",
    "python -m benchmarks.paper page                        # this page and its pictures",
)
_METHOD = """\
RUNS holds a folder NAME-sSEED for each model, trained by the commands in the first table. Every
model is exported with matrices and table in float32, so that no rounding is in the figures, and
judged by `edge_memllm.evaluation.perplexity` and `edge_memllm.evaluation`, in windows as long as
the training's sequences that advance by half of that: on the first 400,000 characters of
what is held out of the two corpora (*together*: both) and of Wikitext-2, which is of another kind.
Of Wikipedia that is most of 261 articles; of the novels it is one half of **one** novel, so
that column speaks of an author, not of novels. The sweeps, on runs of the first seed, read 120,000
characters of each. DATA holds the files that `benchmarks/paper/judging.py` names.
"""

_JUDGED = "#perplexity-at-equal-total-and-equal-active-parameters-table-2-figs-9-and-10"
_VERDICTS = f"""\
*Yes* and *no, the reverse* are said of differences beyond the noise between seeds, *cannot be told*
of all others ([how that is judged]({_JUDGED})). Where
no error stands, from "At a factor of 0.5" on, one run of one seed was measured, and the word says
what that run shows. These models are a thousandth of the paper's and saw less than a thousandth of
its tokens: that one agrees says little about the paper, and that it does not says no more."""


def write_page(*, check: bool) -> int:
    """Write page and pictures, or with `check` return 1 when they are not what they would be."""
    return write_files(page_files(), "python -m benchmarks.paper page", check=check)


def page_files(folder: Path = FOLDER) -> Mapping[Path, str]:
    """Return the text of every file by its path, from the stored figures of a folder."""
    stored = {
        name: Results(name, folder).all()
        for name in ("perplexity", "documents", "gain", "drop", "bits", "rank", "decode")
    }
    parts = [
        quality_section(stored["perplexity"]),
        longer_section(stored["perplexity"]),
        one_budget_section(stored["documents"], _tokens_each(stored["perplexity"])),
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
        f"## What agrees\n\n{_VERDICTS}\n\n{table(['the paper', 'here', 'agrees'], rows)}\n",
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


def _tokens_each(entries: Entries) -> float | None:
    """Tokens for each layer parameter of Base in the first table."""
    base = entries.get("base-s1")
    return None if base is None else base["figures"]["tokens_seen"] / base["model"]["total"]


def decode_section(entries: Entries) -> Section:
    """Return the section from the entries that `decode` has stored."""
    title = "Decoding time and memory (Table 6)"
    if not entries:
        return Section(title, f"{MISSING}.\n\n{_published_decoding()}", (_decoding_missing(),))
    preset = next(iter(entries.values()))["preset"]
    runs = {each["variant"]: each["figures"] for each in entries.values()}
    text = "\n\n".join(
        [_circumstances(preset, runs), _decoding_table(runs), "The paper:", _published_decoding()]
    )
    return Section(title, text, tuple(_decoding_claims(runs)))


def _decoding_table(runs: Mapping[str, Any]) -> str:
    head = ["", "decode, ms/token", "speed over Base", "prefill, tokens/s", "memory of its own, MB"]
    rows = []
    for variant in TABLE_6:
        if variant in runs:
            ratio = runs[variant]["ratios"][0]["decode"]["text"]
            decode, prefill, memory = _beside_base(runs[variant])
            rows.append([VARIANTS[variant], decode, ratio, prefill, memory])
        elif variant != "base":
            rows.append([VARIANTS[variant], MISSING, *["-"] * (len(head) - 2)])
    return table(head, rows)


def _beside_base(run: Mapping[str, Any]) -> list[str]:
    """Figures of a model, each with that of the Base it was measured in turns with."""
    found = [
        (
            f"{1000 / cell['decode_tokens_per_second']:.2f}",
            f"{cell['prefill_tokens_per_second']:.0f}",
            f"{cell['rss_anon_bytes'] / 1e6:.0f}",
        )
        for cell in (run["model"], run["base"])
    ]
    return [f"{own} (Base {base})" for own, base in zip(*found, strict=True)]


def _circumstances(preset: str, runs: Mapping[str, Any]) -> str:
    found = next(iter(runs.values()))
    cell, where = found["model"], found["environment"]
    times = [1000 / run["base"]["decode_tokens_per_second"] for run in runs.values()]
    return (
        f"Preset `{preset}` with random weights, graph in {cell['model']['graph_weights']}, table "
        f"in {cell['model']['codec']}, records {cell['cache']} ({cell['reader']}); prompt of "
        f"{cell['context']} tokens, {cell['new_tokens']} decoded, {found['repeats']} rounds, each "
        "model in turns with Base, whose figures of the same rounds are in brackets; speed over "
        "it is the ratio of the two, with the interval of 95 % of resampled rounds. "
        f"{where['processor']}, {cell['threads']} threads. Base itself took {min(times):.2f} to "
        f"{max(times):.2f} ms from one row to another, so each row is to be compared with its own "
        "Base and not with the others."
    )


def _published_decoding() -> str:
    base = TABLE_6["base"]
    rows = [
        [VARIANTS[name], f"{ms:.2f}", f"{base[1] / ms:.2f}", f"{memory:.3f} GB"]
        for name, (memory, ms) in TABLE_6.items()
    ]
    return table(["1B, one A100", "decode, ms/token", "speed over Base", "memory"], rows)


def _decoding_claims(runs: Mapping[str, Any]) -> Iterator[Claim]:
    if "memoryllm" not in runs:
        yield _decoding_missing()
        return
    ratio = runs["memoryllm"]["ratios"][0]["decode"]
    found = runs["memoryllm"]
    memory = found["model"]["rss_anon_bytes"] / found["base"]["rss_anon_bytes"] - 1
    here = f"{ratio['text']} the speed, {change(memory)} memory of its own"
    agrees = "faster and smaller, yes" if ratio["low"] > 1 and memory < 0 else "no"
    yield Claim(_decoding_missing().paper, here, agrees)


def _decoding_missing() -> Claim:
    paper = "MemoryLLM decodes 1.49 times as fast as Base, with 37 % less memory"
    return Claim(paper, MISSING, "-")


_ELSEWHERE = (
    (
        "How often a cache has the record that text asks for, by size and policy; which storage",
        "speed.md#how-often-a-cache-has-what-text-asks-for",
    ),
    (
        "Time to the first token, speed from storage against memory",
        "speed.md#streaming-at-the-speed-of-the-hardware",
    ),
    (
        "FFN-M once per distinct token of a batch, against plain",
        "speed.md#the-memory-once-per-distinct-token",
    ),
    ("Making a MemoryLLM of a trained dense model", "conversion.md"),
)


def lacking_section(folder: Path) -> Section:
    """Return the section, with links to those pages of docs/results that are there."""
    rows = []
    for words, place in _ELSEWHERE:
        page = place.partition("#")[0]
        rows.append([words, f"[{page}]({place})" if (folder / page).exists() else MISSING])
    return Section("What the paper lacks", table(["", "measured in"], rows))
