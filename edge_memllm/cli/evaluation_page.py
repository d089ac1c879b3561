"""What ``edge-memllm eval`` shows to people: one table of texts, one of tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from edge_memllm.cli.text import number, table
from edge_memllm.evaluation import combine, combine_divergences

if TYPE_CHECKING:
    from edge_memllm.cli.evaluation import Findings
    from edge_memllm.evaluation import Divergence, Perplexity, Score, TaskResult

_FIGURES = ("acc", "acc_norm", "acc_bytes", "perplexity")


def page(findings: Findings) -> str:
    """Return the tables of what was measured."""
    parts = [
        *_texts(findings.texts),
        *_divergences(findings.divergences),
        *_tasks(findings),
    ]
    return "\n\n".join(parts)


def _texts(texts: Mapping[str, Perplexity]) -> Iterator[str]:
    if not texts:
        return
    all_texts = combine(list(texts.values()))
    rows = [("text", "tokens", "perplexity", "nats per token", "bits per byte", "per word")]
    shown = {**texts, "all": all_texts} if len(texts) > 1 else texts
    rows.extend(
        (
            name,
            number(each.tokens),
            f"{each.perplexity:.3f}",
            f"{each.nll_per_token:.4f}",
            f"{each.bits_per_byte:.4f}",
            f"{each.word_perplexity:,.1f}",
        )
        for name, each in shown.items()
    )
    yield table(rows)
    yield f"windows of {all_texts.context} tokens, every {all_texts.stride}"


def _divergences(divergences: Mapping[str, Divergence]) -> Iterator[str]:
    if not divergences:
        return
    shown = dict(divergences)
    if len(shown) > 1:
        shown["all"] = combine_divergences(list(divergences.values()))
    head = ("against the reference", "mean KL", "median", "99 %", "max", "same top", "perplexity")
    rows: list[tuple[str, ...]] = [head]
    for name, each in shown.items():
        found = each.as_dict()
        kl = (f"{found[key]:.3g}" for key in ("mean_kl", "median_kl", "p99_kl", "max_kl"))
        change = f"{each.reference.perplexity:.3f} {each.perplexity_increase:+.2%}"
        rows.append((name, *kl, f"{each.top1_agreement:.2%}", change))
    yield table(rows)
    yield "KL divergence in nats; perplexity: of the reference, and the change from it"


def _tasks(findings: Findings) -> Iterator[str]:
    results = {
        **findings.tasks,
        **{f"mean of {name}": result for name, result in findings.groups.items()},
    }
    if not results:
        return
    figures = [
        name for name in _FIGURES if any(name in result.scores for result in results.values())
    ]
    rows = [("task", "items", *figures)]
    rows.extend(
        (name, number(result.items), *(_cell(result, figure) for figure in figures))
        for name, result in results.items()
    )
    yield table(rows)
    truncated = sum(result.truncated for result in findings.tasks.values())
    if truncated:
        yield f"{number(truncated)} contexts were longer than the model's and lost their beginning"


def _cell(result: TaskResult, figure: str) -> str:
    score: Score | None = result.scores.get(figure)
    if score is None:
        return ""
    places = 2 if figure == "perplexity" else 4
    error = "" if score.stderr is None else f" ± {score.stderr:.{places}f}"
    return f"{score.value:,.{places}f}{error}"
