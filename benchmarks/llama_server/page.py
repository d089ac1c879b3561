"""Writes docs/results/llama-server.md from the stored run."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "docs/results/llama-server.json"
PAGE = RESULTS.with_suffix(".md")
VERSION = "llama-cpp-python 0.3.36"

# Why a check that applies does not hold, by the beginning of its name.
REASONS = {
    "test_basic.py::test_server_slots": "`/slots` cannot be switched off, and tells no texts",
    "test_basic.py::test_server_model_aliases_and_tags": "an alias is listed as a model of its "
    "own, as vLLM has it, and models have no tags",
    "test_chat_completion.py::test_chat_template_assistant_prefill[prefill1": "a message in parts "
    "is their texts one behind the other; there lines are put between them",
    "test_compat_anthropic.py::test_anthropic_tool_result_with_image": "an image is refused with "
    "400, the request is at fault; there with 500",
    "test_compat_anthropic.py::test_anthropic_vision_format_accepted": "the same",
    "test_compat_anthropic.py::test_anthropic_empty_messages": "no messages are refused; there "
    "they are answered",
    "test_compat_anthropic.py::test_anthropic_thinking": "thinking of a model that does not is "
    "refused, as Anthropic does; there it is ignored",
    "test_compat_oai_responses.py::test_responses_stream_with_llama_telemetry": "a response that "
    "is cut off ends with `response.incomplete`, as OpenAI's do; there with `response.completed`",
    "test_security.py::test_cors_options[http://web.mydomain.fr-Access-Control-Allow-Cred": "pages "
    "are not let ask with cookies: keys are headers",
}

_HEAD = """\
# llama.cpp's checks of its server, against this one

Made by `python -m benchmarks.llama_server`; do not edit it by hand. The checks are those of
{version} (`vendor/llama.cpp/tools/server/tests` of its source package), counted as pytest
counts them. They start `edge-memllm serve` where they would start `llama-server`.

**{passed} of the {applied} checks that apply hold**; {others} others are of what is not here.
{failing}
## What does not hold

| check | why |
| --- | --- |
"""

_REPEAT = """\
## The way to repeat it

```console
pip download llama-cpp-python==0.3.36 --no-deps --no-binary :all:
tar xzf llama_cpp_python-0.3.36.tar.gz
pip install pytest-timeout wget filelock requests
python -m benchmarks.llama_server run --llama-cpp llama_cpp_python-0.3.36/vendor/llama.cpp
```

The model of the checks is one of stories with 260 thousand parameters. In its place is the model
that comes along, exported for the contexts that the checks ask for, with a tokenizer that begins
texts as that one's does. Checks in a row that start it with the same options have the same server,
but for those of what is cached, counted or asleep.

What `llama-server` has as defaults of requests and `serve` has not (`--n-predict`, `--temp`,
`--verbose`) is given with each request. `--reasoning auto` there tells a template to reason, so it
is `on` here. Where a check of chat asks for no form, `ignore_eos` is given, for this model ends its
texts and that one does not. A client that names another model gets this one, by aliases: {names}.
Pages of {origins} are let in for the checks of that, as there all are.
"""


def write_page(*, check: bool) -> int:
    """Write the page, or with `check` return 1 where it is not what would be written."""
    text = page(json.loads(RESULTS.read_text("utf-8")))
    if not check:
        PAGE.write_text(text, "utf-8")
        return 0
    if PAGE.read_text("utf-8") == text:
        return 0
    print(f"{PAGE.name} is not what the stored run gives: write it again.", file=sys.stderr)
    return 1


def page(told: dict[str, Any]) -> str:
    """Return the page of a stored run."""
    checks = told["checks"]
    wrong = [each for each in checks if each["outcome"] != "passed"]
    head = _HEAD.format(
        version=VERSION,
        passed=len(checks) - len(wrong),
        applied=len(checks),
        others=sum(told["others"].values()),
        failing=_environment(told["environment"]),
    )
    rows = (f"| `{_shown(each['name'])}` | {_reason(each)} |" for each in wrong)
    repeat = _REPEAT.format(
        names=", ".join(f"`{each}`" for each in told["names"]),
        origins=" and ".join(f"`{each}`" for each in told["origins"]),
    )
    parts = [
        head + "\n".join(rows),
        "## What held, file by file\n\n" + _table(("file", "hold", "of"), _files(checks)),
        "## What does not apply\n\n"
        + _table(("checks", "they are of"), ((str(n), why) for why, n in told["others"].items())),
        "## What of the checks was edited\n\n"
        "Where one expects the very words, counts or names of its model, and is of something else. "
        "The edits\nthemselves are in `benchmarks/llama_server/edits.py`.\n\n"
        + _table(("file", "edits", "in place of"), _edits(told["edits"]))
        + "\n\nWords of the stories, for which any text will do: "
        + ", ".join(f"`{each}`".replace("|", "\\|") for each in told["stories"])
        + ". Other expressions are matched as they\nare.",
        repeat.rstrip(),
    ]
    return "\n\n".join(parts) + "\n"


def _environment(told: dict[str, Any]) -> str:
    words = ", ".join(f"{name} {value}" for name, value in told.items())
    return f"({words})\n"


def _shown(name: str) -> str:
    return name.replace("|", "\\|").replace("\n", "\\n").replace("`", "'")


def _reason(check: dict[str, Any]) -> str:
    found = (why for begin, why in REASONS.items() if check["name"].startswith(begin))
    return next(found, f"not explained: {_shown(check['said'])}")


def _files(checks: Iterable[dict[str, Any]]) -> Iterator[tuple[str, str, str]]:
    files = [(each["name"].partition("::")[0], each["outcome"] == "passed") for each in checks]
    for file, count in Counter(name for name, _ in files).items():
        yield f"`{file}`", str(files.count((file, True))), str(count)


def _edits(edits: Iterable[dict[str, Any]]) -> Iterator[tuple[str, str, str]]:
    counts = Counter[tuple[str, str]]()
    for each in edits:
        counts[each["file"], each["why"]] += each["times"]
    for (file, why), count in counts.items():
        yield f"`{file}`", str(count), why


def _table(titles: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [titles, ("---",) * len(titles), *rows]
    return "\n".join(f"| {' | '.join(each)} |" for each in lines)
