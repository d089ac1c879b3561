"""The report: one HTML page that needs nothing else, in light and in dark, with or without script.

Shows an `Explanation`, whatever is in it. All text that comes from a model is escaped, and the
page's own policy lets a browser run nothing but the script that is written here.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Sequence
from importlib.resources import files

from edge_memllm.drawing import STYLE
from edge_memllm.interpretation.findings import Explanation, ModelFacts
from edge_memllm.interpretation.report.cards import key_section, similar_section, token_section
from edge_memllm.interpretation.report.cluster_map import cluster_data, cluster_section
from edge_memllm.interpretation.report.highlights import highlights
from edge_memllm.interpretation.report.layer_curves import curve_section
from edge_memllm.interpretation.report.markup import Markup, element, figure, note, together
from edge_memllm.interpretation.report.sentences import sentence_data, sentence_section
from edge_memllm.interpretation.report.token_text import running

_FAMILY = {0: "MemoryLLM", 8: "dense, without memory"}


def html_page(explanation: Explanation) -> str:
    """Return the page as HTML5, to be stored as UTF-8, which all of it can be."""
    sections = list(_sections(explanation))
    name = running(explanation.model.name)
    body = [
        _header(explanation),
        *([_contents(sections)] if len(sections) > 1 else []),
        element("main", *(_section(*each) for each in sections)),
        element("script", _data(explanation), type="application/json", id="data"),
        element("script", _file("page.js")),
    ]
    head = [
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width,initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=_policy()),
        element("meta", name="color-scheme", content="light dark"),
        element("link", rel="icon", href="data:,"),
        element("title", f"Inside the memory of {name}"),
        element("style", Markup(STYLE + _file("page.css"))),
    ]
    whole = element("html", element("head", *head), element("body", *body), lang="en")
    return f"<!doctype html>\n{whole}\n"


def _sections(found: Explanation) -> Iterator[tuple[str, str, Markup]]:
    """Anchor, title and content of all that was asked for."""
    if found.sentences:
        texts = [sentence_section(each, place) for place, each in enumerate(found.sentences)]
        yield "text", "Where in a text memory matters", together(*texts)
    if found.clusters:
        yield "clusters", "What memory groups together", cluster_section(found.clusters)
    if found.curves is not None:
        yield "layers", "How the layers differ", curve_section(found.curves)
    if found.tokens:
        yield "tokens", "What a token's memory holds", token_section(found.tokens)
    if found.keys:
        yield "keys", "What a key is about", key_section(found.keys)
    if found.similar:
        yield "similar", "Tokens with similar memory", similar_section(found.similar)


def _contents(sections: Sequence[tuple[str, str, Markup]]) -> Markup:
    links = (element("a", title, href=f"#{key}") for key, title, _ in sections)
    return element("nav", *links, aria_label="Contents")


def _section(key: str, title: str, inside: Markup) -> Markup:
    return element("section", element("h2", title), inside, id=key, class_="part")


def _header(found: Explanation) -> Markup:
    model = found.model
    said = highlights(found)
    return element(
        "header",
        element("p", "Inside the memory of", class_="soft over"),
        element("h1", running(model.name)),
        element("dl", *_facts(model), class_="facts"),
        *([element("ul", *(element("li", each) for each in said), class_="said")] if said else []),
        note("Made by ", element("code", running(found.command))),
    )


def _facts(model: ModelFacts) -> Iterator[Markup]:
    family = _FAMILY.get(model.beta, f"Flex-MemoryLLM, beta {model.beta}")
    rows = {
        "model": family,
        "layers": f"{model.layers}",
        "width": f"{model.width:,}",
        "vocabulary": f"{model.vocabulary:,} tokens",
    }
    if model.memory_layers != model.layers:
        rows["memories of a token"] = f"{model.memory_layers}"
    if model.keys is not None:
        rows["keys per layer"] = f"{model.keys:,}"
    if any(gain != 1 for gain in model.memory_gain):
        rows["memory gain"] = ", ".join(figure(gain) for gain in model.memory_gain)
    rows["read from"] = f"the {running(model.source)}"
    rows["identity"] = running(model.identity)[:19]
    for name, value in rows.items():
        whole = model.identity if name == "identity" else None
        yield element(
            "div", element("dt", name), element("dd", value, title=whole and running(whole))
        )


def _data(found: Explanation) -> Markup:
    """Return what the script reads, as JSON that no text in it can end."""
    data = {
        "sentences": [sentence_data(each) for each in found.sentences],
        "clusters": cluster_data(found.clusters),
    }
    written = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return Markup(written.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _policy() -> str:
    digest = base64.b64encode(hashlib.sha256(_file("page.js").encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _file(name: str) -> Markup:
    return Markup(files(__package__).joinpath(name).read_text("utf-8"))
