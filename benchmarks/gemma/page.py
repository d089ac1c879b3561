"""docs/results/gemma.md and its picture, from the stored figures alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.gemma.bars import bars
from benchmarks.gemma.figures import FIGURES, Rounds, names, ratios, values
from benchmarks.gemma.measuring import DISTURBANCE, OURS, STEPS
from benchmarks.gemma.shapes import PUBLISHED
from benchmarks.gemma.store import COMPILED, EXPORTS, LIMITED, RESULTS, ROUNDS, SIZES, stored
from benchmarks.generated import write_files
from benchmarks.peers.page import markdown
from edge_memllm.svg import Box, beside, dot, frame, picture, spanning

PAGE = RESULTS.with_suffix(".md")
PICTURE = RESULTS.parents[1] / "images" / "gemma.svg"

_HEAD = """\
# Gemma 4 at its sizes, beside llama.cpp

The published shapes of Gemma 4 E2B and E4B with random weights: speed and memory are those of the
real models, what is said is noise. Our artifact has an int4 graph and a table of int8 rows, *int2*
two bits in feed-forward and head; the GGUF file of the same network is Q4_0 throughout, its table
and its head included, which is smaller and faster than what llama.cpp's quantiser makes by itself
(Q6_K for the head). Tokens go in and come out as ids: the GGUF file has no vocabulary, ours has the
tokenizer that `make` was given, here Gemma 3's with as many entries. Made by `python -m
benchmarks.gemma page` of `gemma.json`; edit neither.

```console
pip install xllamacpp                                    # llama.cpp, prebuilt
python -m benchmarks.gemma make --folder DIR --tokenizer FOLDER    # E2B: 12 GB, minutes
python -m benchmarks.gemma export --folder DIR
python -m benchmarks.gemma measure --folder DIR --rounds 3
python -m benchmarks.gemma limit --folder DIR            # in groups of 2 and 1.5 GB: as root
```

For the rounds beside a llama.cpp that is compiled here, llama-cpp-python is installed from source
with `CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON"` and what else the
processor has: left to itself (`-DGGML_NATIVE=ON`) it takes AMX too, and crashed here.

*Table in memory* is llama.cpp without mapping and without its lazy mode, and ours with `--reader
ram`; *lazy* is llama.cpp with `--lazy-mode on`, which maps the table and reads rows as they are
touched (by itself it does so from 4 GiB on, so neither shape gets it). *Cold*: the table is dropped
from the page cache before the prompt and before every token, pages that llama.cpp has mapped
included; so it is for those whose table is in memory, who lose only the pause. Our weights are
mapped as this processor wants them, which is the default for large graphs; they were repacked
before. Prompts are distinct random tokens, so is nearly all that is decoded. *Own memory* is
anonymous, *mapped* the pages of files that the system may drop, *peak* the most of both together
since the start.
"""
_MISSING = "Not measured yet.\n"
_SHAPES = {shape: shape.upper() for shape in PUBLISHED}
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 760, 380, 72, 720, 48, 316


def write_page(*, check: bool) -> int:
    """Write page and picture, or with `check` return 1 when they are not what they would be."""
    return write_files(page_files(stored()), "python -m benchmarks.gemma page", check=check)


def page_files(results: Mapping[str, Any]) -> dict[Path, str]:
    """Return the text of the page, and of the picture where there is something to show."""
    shown = {shape: results[shape] for shape in _SHAPES if shape in results}
    measured = {shape: each[ROUNDS] for shape, each in shown.items() if each.get(ROUNDS)}
    parts = [_HEAD]
    if measured:
        parts.append(f"![decode speed by memory](../images/{PICTURE.name})\n")
    for shape, each in shown.items():
        parts.extend(_shape_part(shape, each))
    found = {PAGE: "\n".join(parts if shown else [*parts, _MISSING])}
    if measured:
        found[PICTURE] = plot(measured)
    return found


def _shape_part(shape: str, found: Mapping[str, Any]) -> Iterator[str]:
    yield f"## {_SHAPES[shape]}\n"
    yield f"{_environment(found)}\n"
    if shape == "e2b" and (asked := bars(found)):
        yield "What was asked for, and what was found:\n"
        yield markdown(["", "asked", "found", ""], asked) + "\n"
    if found.get(ROUNDS):
        yield from _rounds_part(found[ROUNDS], found["threads"])
    if found.get(COMPILED):
        yield (
            "The same beside a llama.cpp that was compiled for this processor, which the prebuilt "
            "one is not:\n"
        )
        if shape == "e2b":
            yield markdown(["", "asked", "found", ""], bars({ROUNDS: found[COMPILED]})) + "\n"
        yield from _rounds_part(found[COMPILED], found["threads"])
    if found.get(LIMITED):
        yield from _limited_part(found[LIMITED])
    if found.get(EXPORTS):
        yield from _exports_part(found[EXPORTS])


def _rounds_part(rounds: Rounds, threads: int) -> Iterator[str]:
    contenders = names(rounds)
    yield (
        f"In turns, {threads} threads each, {len(rounds)} rounds: medians (lowest to highest). "
        f"{STEPS} tokens are decoded behind each prompt. {_disturbed(rounds)}\n"
    )
    rows = [
        [figure, *(_spread(values(rounds, name, key)) for name in contenders)]
        for key, figure in FIGURES.items()
    ]
    yield markdown(["", *contenders], rows) + "\n"
    others = [name for name in contenders if name != OURS]
    yield (
        f"{OURS} to the others, median of the rounds' ratios: for speeds more is better, for "
        "seconds and memory less.\n"
    )
    rows = [
        [figure.rsplit(", ", 1)[0], *(_ratio(ratios(rounds, key, name)) for name in others)]
        for key, figure in FIGURES.items()
    ]
    yield markdown(["", *(f"to {name}" for name in others)], rows) + "\n"
    for name in contenders:
        settings = rounds[-1][name]["settings"]
        yield f"- {name}: {', '.join(f'{k} {v}' for k, v in settings.items())}"
    yield ""


def _limited_part(limited: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield (
        "Within a limit of memory, mapped files and page cache counted (a control group), one "
        "process at a time, its files dropped from the page cache before. *Nothing mapped* is "
        "ours with `--packed-cache off`, *all mapped* llama.cpp as it comes.\n"
    )
    rows = [[each["contender"], _limit(each["limit"]), *_limited_cells(each)] for each in limited]
    head = ["", "limit", "load and first token, s", "decode at 128", "prefill of 512", "own, MB"]
    yield markdown(head, rows) + "\n"


def _limited_cells(each: Mapping[str, Any]) -> list[str]:
    if "ended" in each:
        return [each["ended"], "-", "-", "-"]
    return [f"{each[k]:.3g}" for k in ("first_token", "decode_128", "prefill")] + [
        f"{each['own_memory']:,.0f}"
    ]


def _exports_part(exports: Mapping[str, Any]) -> Iterator[str]:
    yield "Exported from the folder in bfloat16:\n"
    rows = [
        [
            form,
            f"{each['checkpoint_bytes'] / 1e9:.2f}",
            f"{each['seconds'] / 60:.1f}",
            f"{each['processor_seconds'] / 60:.1f}",
            f"{each['peak_anonymous_bytes'] / 1e9:.2f}",
            f"`{each['options']}`",
        ]
        for form, each in exports.items()
    ]
    yield (
        markdown(
            ["", "folder, GB", "minutes", "of a processor", "peak own memory, GB", "options"], rows
        )
        + "\n"
    )


def _environment(found: Mapping[str, Any]) -> str:
    machine = ", ".join(f"{name} {value}" for name, value in found["environment"].items())
    sizes = "; ".join(
        f"{name}: {', '.join(f'{part} {size / 1e9:.2f} GB' for part, size in parts.items())}"
        for name, parts in found.get(SIZES, {}).items()
    )
    return f"{machine}. {sizes}." if sizes else f"{machine}."


def _disturbed(rounds: Rounds) -> str:
    count = sum(
        each["taken_by_others"] > DISTURBANCE for found in rounds for each in found.values()
    )
    runs = sum(len(found) for found in rounds)
    if not count:
        return "Nobody else took more than 3 % of the processors."
    return f"During {count} of {runs} turns others took more than 3 % of the processors."


def _spread(found: Sequence[float]) -> str:
    if not found:
        return "-"
    if len(found) == 1 or min(found) == max(found):
        return f"{median(found):,.3g}" if max(found) < 1000 else f"{median(found):,.0f}"
    if max(found) >= 1000:
        return f"{median(found):,.0f} ({min(found):,.0f} to {max(found):,.0f})"
    return f"{median(found):.3g} ({min(found):.3g} to {max(found):.3g})"


def _ratio(found: Sequence[float]) -> str:
    return f"{median(found):.2f}" if found else "-"


def _limit(limit: int | None) -> str:
    return "none" if limit is None else f"{limit / 1e9:g} GB"


def plot(measured: Mapping[str, Rounds]) -> str:
    """Decode speed against memory of its own: ours full, llama.cpp hollow."""
    points = [
        (
            median(values(rounds, name, "own_memory")),
            median(values(rounds, name, "decode_128")),
            f"{_SHAPES[shape]}: {name}",
            name.startswith(OURS),
        )
        for shape, rounds in measured.items()
        for name in names(rounds)
    ]
    x = spanning([0.0, *(memory for memory, *_ in points)], _LEFT, _RIGHT)
    y = spanning([0.0, *(speed for _, speed, *_ in points)], _BOTTOM, _TOP)
    title = "Decode at 128 tokens by memory of its own"
    parts = frame(title, (x, y), ("own memory, MB", "tokens/s"))
    places = []
    for memory, speed, label, ours in points:
        at = (x.place(memory), y.place(speed))
        words = f"{label}: {memory:,.0f} MB, {speed:.1f} tokens/s"
        parts.append(dot(*at, 0 if ours else 1, hollow=not ours, words=words))
        places.append((*at, label))
    parts.extend(beside(places, Box(_LEFT + 2, _TOP, _WIDTH, _BOTTOM)))
    return picture(_WIDTH, _HEIGHT, title, parts, alone=True)
