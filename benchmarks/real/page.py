"""docs/results/real-models.md and its picture, from the stored figures alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.generated import write_files
from benchmarks.peers.page import markdown
from benchmarks.real.comparison import RESULTS
from benchmarks.real.speed import FIGURES, OURS, POSITIONS
from edge_memllm.svg import Box, beside, dot, frame, path, picture, spanning, text

PAGE = RESULTS.with_suffix(".md")
PICTURE = RESULTS.parents[1] / "images" / "real-models.svg"

_HEAD = """\
# A real model, beside llama.cpp

SmolLM2-135M-Instruct from its GGUF file: our artifact of it and llama.cpp on the file itself, and a
copy off the file's grid in llama.cpp's types and in our forms. Made by `python -m benchmarks.real
page` of `real-models.json`; edit neither.

```console
make real                                       # whether the model holds at all
pip install xllamacpp                           # prebuilt; or llama-cpp-python, which compiles
python -m benchmarks.real compare --text TEXT   # the file: quality, speed, memory
python -m benchmarks.real copy --text TEXT      # the copy; its types need the compiled one
```

Everything is held against the float weights in transformers (float32): of the file, dequantised by
the `gguf` library. *Divergence* is the mean KL divergence of a token's distribution in nats,
*agreement* the share of tokens for which both hold the same one for the likeliest. TEXT chose
nothing of any model. Sizes of ours are those of the graph and the table, of llama.cpp's those of
the tensors.
"""
_NAMES = {
    **{f"decode_{position}": f"decode at {position}, tokens/s" for position in POSITIONS},
    "prefill": "prefill of 512, tokens/s",
    "load": "load, s",
    "own_memory": "memory of its own, MB",
    "mapped_memory": "mapped files, MB",
}
_MISSING = "Not measured yet.\n"
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 760, 420, 72, 720, 48, 356


def write_page(*, check: bool) -> int:
    """Write page and picture, or with `check` return 1 when they are not what they would be."""
    stored = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    return write_files(page_files(stored), "python -m benchmarks.real page", check=check)


def page_files(results: Mapping[str, Any]) -> dict[Path, str]:
    """Return the text of the page, and of the picture where there is something to show."""
    parts = [
        _HEAD,
        *_file_part(results.get("file")),
        *_copy_part(results.get("copy")),
        *_json_part(results.get("json")),
    ]
    found = {PAGE: "\n".join(parts)}
    if "copy" in results:
        found[PICTURE] = plot(results["copy"]["quality"]["models"])
    return found


def _file_part(found: Mapping[str, Any] | None) -> Iterator[str]:
    yield "## The file as it is\n"
    if found is None:
        yield _MISSING
        return
    yield f"`{found['name']}`. {_judged_on(found['quality'])}\n"
    yield _quality_table(found["quality"])
    measured = found["speed"]
    yield (
        f"\nIn turns, {measured['threads']} threads each, {measured['rounds']} rounds: medians "
        "(lowest to highest); every round starts the processes anew. Where others took more than "
        f"3 % of the processors a run was repeated, twice at most: {_disturbed(measured)}.\n"
    )
    yield _speed_table(measured["models"])
    yield (
        "\nOurs to llama.cpp, median of the rounds' ratios (lowest to highest). For speeds more is "
        "better, for the others less.\n"
    )
    yield _ratio_table(measured["models"])
    yield f"\n{_environment(found['environment'])}\n"
    for name, each in measured["models"].items():
        yield f"- {name}: {', '.join(f'{k} {v}' for k, v in each['settings'].items())}"
    yield ""


def _copy_part(found: Mapping[str, Any] | None) -> Iterator[str]:
    yield "## A copy off the grid, in few bits\n"
    if found is None:
        yield _MISSING
        return
    yield (
        "What a file's author has rounded already is easily rounded again. So every channel was "
        f"multiplied by a random factor (0.8 to 1.25, seed {found['seed']}) that its neighbour "
        "takes back, and the head is a matrix of its own: the function stays, no weight lies on "
        "the old grid. The same float16 weights went into a folder of transformers, for us, and a "
        'GGUF file, for llama.cpp\'s quantiser (no importance matrix). "As Q4_0" and the like are '
        "ours with `--target-size`, the bytes of that type's tensors, graph and table together, "
        "with `--accept-quality-loss`. SmolLM2's rows of 576 are no multiple of 256, so most of "
        "llama.cpp's K types fall back there, Q6_K to 8 bits.\n"
    )
    yield f"{_judged_on(found['quality'])}\n"
    yield f"![divergence by size](../images/{PICTURE.name})\n"
    yield _quality_table(found["quality"])
    if found["refused"]:
        yield f"\nRefused by the export: {', '.join(found['refused'])}."
    yield f"\n{_environment(found['environment'])}\n"


def _json_part(found: Mapping[str, Any] | None) -> Iterator[str]:
    yield "## JSON that ends\n"
    if found is None:
        yield _MISSING
        return
    yield (
        f"`python -m benchmarks.real json`: {found['seeds']} seeds of each [form](../forms.md), at "
        f"most {found['limit']:,} tokens, all in one engine. *Ended* is what its form ended, not "
        "its limit; *valid* what jsonschema-rs accepts under the schema as it was given. The open "
        "schema names properties and requires none, the strict one requires all: text, integer, "
        "number, enum, boolean, an object, an array of texts and one of objects.\n"
    )
    head = ["", "temperature", "ended", "valid", "tokens, median", "most"]
    rows = [
        [
            row["form"],
            f"{row['temperature']:g}",
            f"{row['ended']} of {found['seeds']}",
            f"{row['valid']} of {found['seeds']}",
            str(row["tokens"][len(row["tokens"]) // 2]),
            str(row["tokens"][-1]),
        ]
        for row in found["rows"]
    ]
    yield markdown(head, rows)
    yield f"\n{_environment(found['environment'])}\n"


def _judged_on(quality: Mapping[str, Any]) -> str:
    return (
        f"Judged on {quality['tokens']:,} tokens of `{quality['text']}` in windows of "
        f"{quality['window']}; float weights: perplexity {quality['perplexity']:.3f}."
    )


def _quality_table(quality: Mapping[str, Any]) -> str:
    head = ["", "MB", "perplexity", "of the float weights'", "divergence, nats", "agreement"]
    rows = [
        [
            _label(name, each),
            _size(each["bytes"]),
            f"{each['perplexity']:.3f}",
            f"{each['increase']:+.2%}",
            f"{each['kl']:.5f}",
            f"{each['agreement']:.2%}",
        ]
        for name, each in _by_size(quality["models"])
    ]
    return markdown(head, rows)


def _by_size(models: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return sorted(models.items(), key=lambda item: sum(item[1]["bytes"].values()))


def _label(name: str, model: Mapping[str, Any]) -> str:
    maker = "edge-memllm" if model["ours"] else "llama.cpp"
    return maker if name == maker else f"{maker}, {name}"


def _size(parts: Mapping[str, int]) -> str:
    total = f"{sum(parts.values()) / 1e6:.1f}"
    if len(parts) == 1:
        return total
    return f"{total} ({', '.join(f'{name} {size / 1e6:.1f}' for name, size in parts.items())})"


def _speed_table(models: Mapping[str, Any]) -> str:
    rows = [
        [_NAMES[figure], *(_spread(each[figure], "") for each in models.values())]
        for figure in FIGURES
    ]
    return markdown(["", *models], rows)


def _ratio_table(models: Mapping[str, Any]) -> str:
    others = {name: each for name, each in models.items() if name != OURS}
    rows = [
        [
            _NAMES[figure].split(",")[0],
            *(_spread(each[figure], "ours_") for each in others.values()),
        ]
        for figure in FIGURES
    ]
    return markdown(["", *(f"to {name}" for name in others)], rows)


def _spread(figure: Mapping[str, float], prefix: str) -> str:
    median, least, most = (figure[f"{prefix}{key}"] for key in ("median", "least", "most"))
    return f"{median:.3g} ({least:.3g} to {most:.3g})"


def _disturbed(measured: Mapping[str, Any]) -> str:
    count = sum(each["disturbed"] for each in measured["models"].values())
    return "none stayed disturbed" if not count else f"{count} of the figures stayed disturbed"


def _environment(found: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in found.items()) + "."


def plot(models: Mapping[str, Any]) -> str:
    """Divergence against size, ours and llama.cpp's types side by side."""
    shown = [
        (sum(each["bytes"].values()) / 1e6, each["kl"], name, bool(each["ours"]))
        for name, each in _by_size(models)
    ]
    x = spanning([size for size, *_ in shown], _LEFT, _RIGHT)
    y = spanning([kl for _, kl, *_ in shown], _BOTTOM, _TOP, logarithmic=True)
    title = "Divergence from the float weights by size"
    parts = frame(title, (x, y), ("size, MB", "divergence, nats"))
    places = []
    for colour, ours in enumerate((True, False)):
        series = [each for each in shown if each[3] == ours]
        points = [(x.place(size), y.place(kl)) for size, kl, *_ in series]
        parts.append(path(points, "line", colour))
        for at, (size, kl, name, _) in zip(points, series, strict=True):
            parts.append(
                dot(*at, colour, hollow=not ours, words=f"{name}: {size:.1f} MB, {kl:.5f}")
            )
            places.append((*at, name))
    parts.extend(beside(places, Box(_LEFT + 2, _TOP, _WIDTH, _BOTTOM), _legend_room()))
    parts.extend(_legend())
    return picture(_WIDTH, _HEIGHT, title, parts, alone=True)


def _legend_room() -> Sequence[Box]:
    return [Box(_RIGHT - 130, _TOP - 16, _RIGHT, _TOP + 28)]


def _legend() -> Iterator[str]:
    for colour, name in enumerate(("edge-memllm", "llama.cpp")):
        height = _TOP - 4 + 18 * colour
        yield dot(_RIGHT - 118, height, colour, hollow=colour == 1)
        yield text(_RIGHT - 108, height + 4, name, "name")
