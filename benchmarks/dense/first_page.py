"""The page on the first layer alone, and what it says of when converting pays; needs no torch."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.dense.page_parts import (
    FIRST,
    FOLDER_COMMAND,
    MODEL,
    Stored,
    gap_words,
    made_of,
)
from benchmarks.paper.layout import console, table


def first_page(found: Stored) -> str:
    """The page on the first layer alone."""
    model, size, made = found["model"], found["size"], found["replacements"]
    rows = [["as it is", f"{math.exp(found['dense']):.2f}", "", f"{_ffn(model):,}", "0"]]
    for name, each in made.items():
        gap = each["difference"]
        rows.append(
            [
                name,
                f"{math.exp(found['dense'] + gap['mean']):.2f}",
                gap_words(gap),
                f"{_neurons(name, size) * 3 * model['width']:,}",
                f"{model['vocabulary'] * model['width']:,}" if "table" in name else "0",
            ]
        )
    head = ["the first layer has", "perplexity", "nats lost", "parameters computed", "row values"]
    return (
        "\n\n".join(
            [
                "# Converting one layer: the first",
                made_of(FIRST),
                first_verdict(found),
                table(head, rows),
                "In brackets: 95 % of resampled held-out documents.",
                _FIRST_METHOD.format(
                    model=MODEL,
                    learned=f"{found['tokens']['learned']:,}",
                    judged=f"{found['tokens']['judged']:,}",
                    documents=found["documents"],
                    seen=f"{found['seen']:.1%}",
                    fitted=f"{size['fitted'] * (size['length'] - 1):,}",
                ),
                *_saved(found),
                console(FOLDER_COMMAND, _FIRST_COMMAND),
            ]
        )
        + "\n"
    )


_FIRST_COMMAND = (
    "python -m benchmarks.dense first MODEL --text enwiki-slice/train.txt eltec-eng/train.txt "
    "--runs RUNS"
)
_FIRST_METHOD = """\
[Of all layers of {model} only the first is a table](layers.md), so this is converting at its best:
one feed-forward network goes to the table, all others stay as they are, and nothing is trained.

- *table*: a row for every token of the vocabulary, the mean of what the layer puts out for it
  over {learned} tokens of Wikipedia and novels, drawn to what it gives for the token once planted
  in the text in the place of another, or to the mean of all, as strongly as leave-one-out says.
  Tokens that the text lacks have that prior. *Other tokens alone*: what it gives for them behind
  the token that begins a text instead, where much attention goes to that one.
- *neurons*: those of the layer that make up best for the others, with output weights of their own,
  by regression on {fitted} tokens. These are the control: parameters that stay computed, and no
  table.
- *nothing*: the layer without its feed-forward network. Whatever replaces it, the token that begins
  a window has its constant.
- *Judged* on {judged} tokens of {documents} documents that nothing learned from; {seen} of them are
  of tokens that the text has. One run of each; nothing in it is random but the documents."""


def _ffn(model: Stored) -> int:
    return 3 * int(model["width"]) * int(model["neurons"])


def _neurons(name: str, size: Stored) -> int:
    """How many neurons a replacement computes, by its name."""
    return int(size["narrow"]) if "neurons" in name else 0


def first_verdict(found: Stored) -> str:
    """When converting pays, said of this model."""
    model, gap = found["model"], found["replacements"]["table"]["difference"]
    share = _ffn(model) / model["parameters"]
    lost = (
        f"costs {gap_words(gap)} nats"
        if gap["low"] > 0
        else f"costs nothing that can be told ({gap_words(gap)} nats)"
        if gap["high"] > 0
        else f"gains {gap_words(gap)} nats"
    )
    return (
        f"In {MODEL}'s first layer a table {lost}. It takes {_ffn(model) / 1e6:.2f} M of "
        f"{model['parameters'] / 1e6:.1f} M parameters, **{share:.1%}**, out of what is computed "
        f"for each token, and puts {model['vocabulary'] * model['width'] / 1e6:.1f} M values on "
        f"storage in their place.{_speed_words(found)}"
    )


def won_words(found: Stored) -> str:
    """What the table wins, in short."""
    saved = found.get("artifacts")
    if saved is None:
        return f"{_ffn(found['model']) / found['model']['parameters']:.1%} of the parameters"
    graph, rows = _saved_bytes(saved)
    ratio = saved["decode"]
    told = ratio["low"] > 1 or ratio["high"] < 1
    speed = f"{ratio['text']} the speed" if told else "no speed that can be told"
    return f"{graph / 1e6:.1f} MB of memory for {rows / 1e6:.1f} MB of storage, and {speed}"


def _speed_words(found: Stored) -> str:
    saved = found.get("artifacts")
    if saved is None:
        return " Its speed as an artifact was not measured."
    ratio, (graph, rows) = saved["decode"], _saved_bytes(saved)
    told = (
        f"decodes {ratio['text']} as fast"
        if ratio["low"] > 1 or ratio["high"] < 1
        else f"decodes no faster that could be told, {ratio['text']}"
    )
    return (
        f" As an artifact it {told}, its graph is {graph / 1e6:.1f} MB smaller and its table "
        f"{rows / 1e6:.1f} MB larger."
    )


def _saved_bytes(saved: Stored) -> tuple[int, int]:
    dense, made = saved["dense"], saved["table"]
    return (
        dense["graph_bytes"] - made["graph_bytes"],
        made["table_bytes"] - dense["table_bytes"],
    )


def _saved(found: Stored) -> list[str]:
    """The table of what an artifact saves, where it was measured."""
    saved = found.get("artifacts")
    if saved is None:
        return []
    dense, made = saved["dense"], saved["table"]

    def row(words: str, value: Any) -> list[str]:
        return [words, value(dense), value(made)]

    rows = [
        row("graph, MB", lambda each: f"{each['graph_bytes'] / 1e6:.1f}"),
        row("table on storage, MB", lambda each: f"{each['table_bytes'] / 1e6:.1f}"),
        row("bytes read a token", lambda each: f"{each['table_bytes_read_per_token']:,.0f}"),
        row("decode, tokens/s", lambda each: f"{each['decode_tokens_per_second']:.1f}"),
        row("prefill, tokens/s", lambda each: f"{each['prefill_tokens_per_second']:.0f}"),
    ]
    words = (
        f"Both exported with a graph in int4 and a table in int8, decoded in turns, "
        f"{saved['rounds']} rounds, {dense['threads']} thread, {saved['processor']}, a machine "
        "that others used as well. Records with rows are padded for reads from storage. "
        f"With the table decoding is {saved['decode']['text']} and "
        f"prefill {saved['prefill']['text']} as fast: the interval of 95 % of resampled rounds."
    )
    return [table(["", "as it is", "first layer in the table"], rows), words]
