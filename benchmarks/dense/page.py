"""Pages of docs/results on dense models and rows, of the stored figures alone; needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.dense.first_page import first_page
from benchmarks.dense.page_parts import (
    CONTROL,
    FIRST,
    FOLDER_COMMAND,
    LAYERS,
    MODEL,
    RESULTS,
    RETROFIT,
    Stored,
    gap_words,
    is_beyond,
    made_of,
    stored,
)
from benchmarks.generated import write_files
from benchmarks.paper.layout import MISSING, console, table
from edge_memllm.svg import Line, line_chart

_PICTURE = RESULTS.parent / "images" / "layers.svg"
_TABLE_FROM = 0.9  # of a layer, explained by rows: here it is called a table


def write_page(*, check: bool) -> int:
    """Write pages and picture, or with `check` return 1 when they are not what they would be."""
    return write_files(page_files(), "python -m benchmarks.dense page", check=check)


def page_files(folder: Path = RESULTS) -> dict[Path, str]:
    """Return the text of every file by its path; a page whose figures are not there is left out."""
    made: dict[Path, str] = {}
    layers, control, retrofit, first = (
        stored(folder / each.name) for each in (LAYERS, CONTROL, RETROFIT, FIRST)
    )
    if layers is not None:
        made[LAYERS.with_suffix(".md")] = layers_page(layers)
        made[_PICTURE] = layers_picture(layers)
    if control is not None:
        made[CONTROL.with_suffix(".md")] = control_page(control)
    if retrofit is not None:
        made[RETROFIT.with_suffix(".md")] = retrofit_page(retrofit)
    if first is not None:
        made[FIRST.with_suffix(".md")] = first_page(first)
    return made


def layers_page(found: Stored) -> str:
    """The page on single layers."""
    layers = found["layers"]
    rows = [
        [
            str(each["layer"]),
            f"{each['seen_share']:.2f}",
            f"{each['token_share']:.2f}",
            f"{each['shrinkage']:g}",
            *(_nats(each["damage"][name]) for name in ("table", "dropped", "alone")),
            _kept(each),
        ]
        for each in layers
    ]
    head = ["layer", "R2, known tokens", "R2, all", "shrinkage", "table", "dropped", "alone"]
    return (
        "\n\n".join(
            [
                "# Which feed-forward layers are tables?",
                made_of(LAYERS),
                _LAYERS_QUESTION.format(model=MODEL),
                console(_LAYERS_COMMAND),
                _layers_verdict(layers),
                "![R2 and damage, layer by layer](../images/layers.svg)",
                _LAYERS_METHOD.format(
                    fit=f"{found['fit_tokens']:,}",
                    distinct=f"{found['distinct']:,}",
                    judged=f"{found['judged_tokens']:,}",
                    windows=found["judged_tokens"] // (found["window"] - 1),
                    window=found["window"],
                    seen=f"{found['seen']:.1%}",
                    loss=f"{found['loss']:.3f}",
                ),
                table([*head, "of dropped, kept by the table"], rows),
                _LAYERS_LIMITS,
            ]
        )
        + "\n"
    )


_LAYERS_COMMAND = (
    "edge-memllm layers SmolLM2-135M-Instruct.Q4_1.gguf --data wiki.txt novels.txt "
    "--valid wiki-valid.txt novels-valid.txt --data-tokens 65536 --valid-tokens 3060"
)
_LAYERS_QUESTION = """\
MemoryLLM learns feed-forward networks that read the token alone, so that a table can take their
place. A model that was not trained so reads the whole stream. How much of each of its feed-forward
layers does the token decide all the same, and what does it cost to put a table there? Measured on
{model}; the command measures it on any dense model that can be exported, and trains nothing."""
_LAYERS_METHOD = """\
- *Rows*: for each token the mean of what the layer puts out for it, over {fit} tokens of Wikipedia
  and novels, {distinct} of them distinct; drawn towards the mean of all rows as if that had been
  seen *shrinkage* times more, chosen for each layer by leaving out one occurrence at a time.
- *Judged* on {judged} tokens of other articles and two other novels: {windows} windows of {window}
  tokens, each behind the token that begins a text. {seen} of them have a row. The loss is {loss}
  nats as the model is.
- *R2*: the share of a layer's squared output, about its mean row, that rows explain, on those
  tokens. 1 is a table.
- *table, dropped, alone*: nats per token by which the loss rises when that one layer's output is
  replaced: by the rows, by zero, by what the layer gives for the token alone behind the token that
  begins a text. Tokens without a row keep the layer's own output, in all three; so do first
  positions, where what comes out is the same for every text, and large. ± is the standard error
  over windows."""
_LAYERS_LIMITS = """\
One model, one layer replaced at a time: damages of several layers do not add up, and nothing was
trained to make up for them. Rows of rare tokens are means of few occurrences, so that more text
would raise R2 a little, most where it is high."""


def _layers_verdict(layers: Sequence[Stored]) -> str:
    tables = [each for each in layers if each["seen_share"] >= _TABLE_FROM]
    others = [each for each in layers if each["seen_share"] < _TABLE_FROM]
    shares = [each["seen_share"] for each in others]
    names = ", ".join(str(each["layer"]) for each in tables) or "none"
    costs = "; ".join(
        f"layer {each['layer']} loses {_nats(each['damage']['table'])} nats as a table, "
        f"{_nats(each['damage']['dropped'])} without anything"
        for each in tables
    )
    middle = sum(each["damage"]["table"]["nats"] for each in others) / len(others)
    found = f"{len(tables)} {'is a table' if len(tables) == 1 else 'are tables'}"
    return (
        f"**Of {len(layers)} layers {found}** (R2 of {_TABLE_FROM} or more): {names}. "
        f"{costs.capitalize()}{'. ' if costs else ''}Of the others the "
        f"token decides {min(shares):.0%} to {max(shares):.0%}, and a table in the "
        f"place of one of them costs {middle:.3f} nats in the mean."
    )


def _kept(layer: Stored) -> str:
    """How much of what the layer is worth the table keeps; not said where it is worth nothing."""
    table_, dropped = (layer["damage"][name] for name in ("table", "dropped"))
    if dropped["nats"] <= 2 * (dropped["error"] or 0):
        return "-"
    return f"{1 - table_['nats'] / dropped['nats']:.0%}"


def _nats(damage: Stored) -> str:
    error = damage["error"]
    return f"{damage['nats']:+.3f}" + ("" if error is None else f" ± {error:.3f}")


def layers_picture(found: Stored) -> str:
    """Shares and damages by layer; both are read off one axis from 0 to 1 and above."""
    layers = found["layers"]

    def line(words: str, colour: int, values: Sequence[float]) -> Line:
        points = [(float(n), max(value, 1e-3)) for n, value in enumerate(values)]
        return Line(words, points, colour)

    lines = [
        line("R2 of rows", 0, [each["seen_share"] for each in layers]),
        *(
            line(f"{words}, nats", colour, [each["damage"][name]["nats"] for each in layers])
            for name, words, colour in (
                ("table", "as a table", 1),
                ("dropped", "dropped", 2),
                ("alone", "alone", 3),
            )
        ),
    ]
    across = [(float(n), str(n)) for n in range(0, len(layers), 5)]
    names = ("layer", "R2, and nats of damage")
    return line_chart(
        f"{MODEL}, layer by layer", names, lines, logarithmic=True, across=across, alone=True
    )


def control_page(found: Stored) -> str:
    """The page on students with rows and without."""
    size, model, dense = found["size"], found["model"], found["dense"]["loss"]
    rows = [["dense", f"{math.exp(dense):.2f}", "", ""]]
    for stage in ("fitted", "distilled"):
        for name, words in (("control", "without rows"), ("rows", "with rows")):
            each = found[stage][name]
            rows.append(
                [
                    f"{words}, {stage}",
                    f"{math.exp(each['loss']):.2f}",
                    gap_words(each["difference"]),
                    ""
                    if name == "control"
                    else gap_words(found[stage]["rows against control"]["difference"]),
                ]
            )
    head = ["network", "perplexity", "nats above the dense model", "against the control"]
    return (
        "\n\n".join(
            [
                "# Does converting pay? Rows against their control",
                made_of(CONTROL),
                _control_verdict(found),
                table(head, rows),
                "In brackets: 95 % of resampled held-out documents.",
                _CONTROL_METHOD.format(
                    model=MODEL,
                    neurons=model["neurons"],
                    width=model["width"],
                    layers=model["layers"],
                    rows=f"{size['rows']:,}",
                    values=f"{found['row_values'] / 1e6:.0f} M",
                    parameters=f"{found['parameters']['rows'] / 1e6:.0f} M",
                    fitted=f"{size['fitted'] * (size['length'] - 1):,}",
                    tokens=f"{found['tokens']:,}",
                    batch=size["batch"] * size["length"],
                    rate=size["rate"],
                    held_out=size["held_out"],
                    length=size["length"],
                    documents=found["dense"]["difference"]["documents"],
                ),
                console(FOLDER_COMMAND, _CONTROL_COMMAND + _steps(found["steps"])),
            ]
        )
        + "\n"
    )


_CONTROL_COMMAND = (
    "python -m benchmarks.dense control MODEL --text enwiki-slice/train.txt eltec-eng/train.txt "
    "--runs RUNS"
)
_CONTROL_METHOD = """\
A student that got rows by a conversion has fewer neurons than the dense model, and it was trained.
What of its quality is the rows'? So two students were made of {model} and treated alike:

- *Both* keep {width} of {neurons} neurons in each of {layers} layers (beta 3; {parameters}
  parameters), those that make up best for the others, with output weights of their own, by
  regression on {fitted} tokens, layer after layer. What a layer puts out at the first position of
  a window is a constant, and both are given it.
- *With rows*: the {rows} most frequent tokens have a row in each layer ({values} values), all
  others share one: means of what is missing, shrunk by leave-one-out; neurons are then chosen for
  what varies within a token.
- *Without*: the same, but no rows.
- *Distilled* on the same {tokens} tokens in the same order, {batch} a step: divergence from the
  dense model's predictions plus distance of the hidden states, Adam without decay, learning rate
  {rate:g}, for rows as for weights. SmolLM2 itself learned from 2 trillion tokens.
- *Judged* on {held_out} windows of {length} tokens of {documents} documents of Wikipedia and
  novels that nothing learned from. One run of each.

What the little text does to the rows: {fitted} tokens give most of them one occurrence or two, and
the neurons beside them are chosen by what varies within a token, of which there is as little. More
text favours rows, so this shows what they cost at a budget like this one, and not that they never
pay. The widths are the same in all layers; none was searched for."""


def _steps(steps: Stored) -> str:
    """What the command says of a training that was stopped."""
    return f" --set steps={steps['made']}" if steps["made"] < steps["planned"] else ""


def _control_verdict(found: Stored) -> str:
    gap = found["distilled"]["rows against control"]["difference"]
    fitted = found["fitted"]["rows against control"]["difference"]
    above = found["distilled"]["rows"]["difference"]["mean"]
    steps = found["steps"]
    stopped = (
        f" Training was stopped after {steps['made']} of {steps['planned']} steps, with a learning "
        "rate far from its end: a whole run of as many tokens would have come further."
        if steps["made"] < steps["planned"]
        else ""
    )

    def words(each: Stored) -> str:
        if not is_beyond(each):
            return f"make no difference that can be told ({gap_words(each)} nats)"
        kind = "help" if each["mean"] < 0 else "hurt"
        return f"{kind} ({gap_words(each)} nats)"

    return (
        f"Before any training rows {words(fitted)}; after {found['tokens']:,} tokens of "
        f"distillation they {words(gap)}. With them the student is still {above:.2f} nats above "
        f"the dense model ({math.exp(above):.1f} times its perplexity): **at this budget "
        "converting does not give back the model**, with rows or without. What more training would "
        f"do was not measured.{stopped}"
    )


def retrofit_page(found: Stored) -> str:
    """The page on rows added to a frozen model."""
    size = found["size"]
    head = ["", "perplexity", "nats against nothing"]
    rows = [["nothing", f"{math.exp(found['base']['loss']):.2f}", ""]]
    if "lora" not in found:
        rows.append([f"LoRA, rank {size['rank']}", MISSING, ""])
    for kind, words in (("lora", f"LoRA, rank {size['rank']}"), ("rows", "rows")):
        if kind not in found:
            continue
        for name, each in found[kind].items():
            if _judged(each):
                part = words if name == "all" else f"{words}: {name}"
                rows.append(
                    [part, f"{math.exp(each['loss']):.2f}", gap_words(each["against_nothing"])]
                )
    return (
        "\n\n".join(
            [
                "# Rows added to a frozen model",
                made_of(RETROFIT),
                _retrofit_verdict(found),
                table(head, rows),
                "In brackets: 95 % of resampled held-out novels.",
                _RETROFIT_METHOD.format(
                    model=MODEL,
                    learned=found["documents"]["learned"],
                    held_out=found["documents"]["held_out"],
                    tokens=f"{found['learned_tokens']:,}",
                    batch=size["batch"] * size["length"],
                    rank=size["rank"],
                    rows=f"{found['row_tokens']:,}",
                    windows=size["held_out"],
                    length=size["length"],
                    rates=_rates(found),
                    edge=_edges(found),
                ),
                console(FOLDER_COMMAND, _RETROFIT_COMMAND),
            ]
        )
        + "\n"
    )


_RETROFIT_COMMAND = (
    "python -m benchmarks.dense retrofit MODEL --text eltec-eng/train.txt --runs RUNS"
)
_RETROFIT_METHOD = """\
Not a conversion: {model} stays as it is, and learns one domain, English novels of 1840 to 1920, in
something beside it.

- *rows*: a row for each of the {rows} tokens of the text, behind each layer, zero at the start:
  what a table could hold, at no cost of memory. *first token alone* is the row of the token that
  begins each window, which every later position can attend to: a prefix that was learned, and not
  what a token of the text knows.
- *LoRA*: rank {rank} beside every matrix of every layer, in memory and computed for each token.
- *Learned* from {tokens} tokens of {learned} novels, {batch} a step, one pass, Adam, the same text
  in the same order.
- *Judged* on {windows} windows of {length} tokens of {held_out} other novels. Windows of both
  kinds begin with the model's own bos_token, `<|im_start|>`, and go on in the middle of a text,
  which this model is not used to: a part of what is learned is that.
- Learning rates: the best on windows of the learned novels after a few steps. {rates} {edge}One
  run each."""


def _rates(found: Stored) -> str:
    parts = []
    for kind, words in (("rows", "Rows"), ("lora", "LoRA")):
        if kind not in found:
            continue
        tried = ", ".join(f"{rate}: {loss:.3f}" for rate, loss in found[kind]["search"].items())
        parts.append(f"{words}: {tried} nats, so {found[kind]['rate']:g}.")
    return " ".join(parts)


def _edges(found: Stored) -> str:
    """Name what did best at the largest rate that was tried, and so may do better yet."""
    kinds = [
        words
        for kind, words in (("rows", "Rows"), ("lora", "LoRA"))
        if kind in found and found[kind]["rate"] == max(map(float, found[kind]["search"]))
    ]
    return "".join(f"{words} might do better at more than was tried. " for words in kinds)


def _retrofit_verdict(found: Stored) -> str:
    gaps = {name: each["against_nothing"] for name, each in found["rows"].items() if _judged(each)}
    rows, lora = gaps["all"], found.get("lora", {}).get("all", {}).get("against_nothing")
    helps = is_beyond(rows) and rows["mean"] < 0
    best = min(gaps, key=lambda name: gaps[name]["mean"])
    own = (
        f"With a part of them alone the best are those of {best}: {gap_words(gaps[best])}, chosen "
        "on the text that judges them. "
        if best != "all"
        else ""
    )
    return (
        f"Against nothing rows {'help' if helps else 'make no difference that can be told'}: "
        f"{gap_words(rows)} nats. {own}The row of the first token by itself, which is a prefix "
        f"that was learned, gives {gap_words(gaps['first token alone'])}; all others without it "
        f"{gap_words(gaps['without the first token'])}. "
        f"{_against_lora(lora, found.get('rows_against_lora'), helps=helps)}"
    )


def _against_lora(lora: Stored | None, gaps: Stored | None, *, helps: bool) -> str:
    if lora is None or gaps is None:
        return (
            "LoRA of as many tokens was not measured yet. **The verdict: not a yes.** No rows are "
            "plugged in before they were held against it."
        )
    told = [is_beyond(gap) and (1 if gap["mean"] > 0 else -1) for gap in gaps.values()]
    if 1 in told:
        verdict = "no.** LoRA learns more of so little text, so no such rows are plugged in."
    elif not helps:
        verdict = "no.** What does not help is not plugged in."
    elif len(told) > 1 and set(told) == {-1}:
        verdict = "yes, at this budget.**"
    else:
        verdict = "cannot be told from LoRA.** Not a yes, so no such rows are plugged in."
    return (
        f"LoRA of as many tokens: {gap_words(lora)}; rows against it, on the same windows: "
        f"{gap_words(gaps['all'])}. {_parts(gaps)} **The verdict: {verdict}"
    )


def _parts(gaps: Stored) -> str:
    """Say how a part of the layers compares, which has to be chosen on other text."""
    if "chosen elsewhere" not in gaps:
        return "A part of LoRA's layers was not judged, so rows of a part are held against none."
    return (
        "Both with all layers or the third of them that is best on the other novels, for each "
        f"novel anew: {gap_words(gaps['chosen elsewhere'])}."
    )


def _judged(found: object) -> bool:
    return isinstance(found, Mapping) and "loss" in found
