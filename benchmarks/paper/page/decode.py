"""Decoding speed and memory of the family against Base (Table 6)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.paper.page.layout import MISSING, VARIANTS, Claim, Entries, Section, change, table
from benchmarks.paper.page.published import TABLE_6


def decode_section(entries: Entries) -> Section:
    """Return the section from the entries that `decode` has stored."""
    title = "Decoding time and memory (Table 6)"
    if not entries:
        return Section(title, f"{MISSING}.\n\n{_paper()}", (_missing(),))
    preset = next(iter(entries.values()))["preset"]
    runs = {each["variant"]: each["figures"] for each in entries.values()}
    text = "\n\n".join([_circumstances(preset, runs), _table(runs), "The paper:", _paper()])
    return Section(title, text, tuple(_claims(runs)))


def _table(runs: Mapping[str, Any]) -> str:
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
    return (
        f"Preset `{preset}` with random weights, graph in {cell['model']['graph_weights']}, table "
        f"in {cell['model']['codec']}, records {cell['cache']} ({cell['reader']}); prompt of "
        f"{cell['context']} tokens, {cell['new_tokens']} decoded, {found['repeats']} rounds, each "
        "model in turns with Base, whose figures of the same rounds are in brackets; speed over "
        "it is the ratio of the two, with the interval of 95 % of resampled rounds. "
        f"{where['processor']}, {cell['threads']} threads."
    )


def _paper() -> str:
    base = TABLE_6["base"]
    rows = [
        [VARIANTS[name], f"{ms:.2f}", f"{base[1] / ms:.2f}", f"{memory:.3f} GB"]
        for name, (memory, ms) in TABLE_6.items()
    ]
    return table(["1B, one A100", "decode, ms/token", "speed over Base", "memory"], rows)


def _claims(runs: Mapping[str, Any]) -> Iterator[Claim]:
    if "memoryllm" not in runs:
        yield _missing()
        return
    ratio = runs["memoryllm"]["ratios"][0]["decode"]
    found = runs["memoryllm"]
    memory = found["model"]["rss_anon_bytes"] / found["base"]["rss_anon_bytes"] - 1
    here = f"{ratio['text']} the speed, {change(memory)} memory of its own"
    yield Claim(_missing().paper, here, "yes" if ratio["low"] > 1 else "no")


def _missing() -> Claim:
    paper = "MemoryLLM decodes 1.49 times as fast as Base, with 37 % less memory"
    return Claim(paper, MISSING, "-")
