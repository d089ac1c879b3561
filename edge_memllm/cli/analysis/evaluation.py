"""``edge-memllm eval``: how well an artifact predicts text, and what it scores on tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from edge_memllm.cli.models import Yes, load_model
from edge_memllm.cli.options import Command, Json, TaskOptions, TextOptions
from edge_memllm.cli.output import StageBars, number, read_text, table, write_json
from edge_memllm.errors import RequestError
from edge_memllm.evaluation import (
    Divergence,
    Perplexity,
    Score,
    Task,
    TaskResult,
    combine,
    combine_divergences,
    mean_result,
    measure_divergence,
    measure_perplexity,
    measure_task,
    read_tasks,
)
from edge_memllm.evaluation.perplexity import Windows
from edge_memllm.loading import LoadOptions
from edge_memllm.model import Model
from edge_memllm.options import Group, Option

_DESCRIPTION = """\
With --text, measure perplexity: the artifact predicts every token of a text from those before it,
in windows of --context tokens that advance by --stride, so that each token has at least their
difference before it. Several files count as separate texts and are summed up. Figures per token
depend on the tokenizer; those per byte and per word do not.

With --reference, also measure how far the predictions are from those of another artifact with the
same tokenizer: KL divergence in nats, and how often both hold the same token for the likeliest.

With --task, score items of JSON-lines files: multiple choice, minimal pairs, or the right
continuation. docs/evaluation.md lists the accepted forms and defines the figures."""

_EXAMPLES = """\
  edge-memllm eval artifact --text valid.txt
  edge-memllm eval artifact --text wiki.txt novel.txt --context 512 --json
  edge-memllm eval artifact --text valid.txt --reference artifact-f32
  edge-memllm eval artifact --task blimp --limit 100
  edge-memllm eval artifact --task arc_easy.jsonl boolq.jsonl --delimiter '\\nAnswer: '"""

_FIGURES = ("acc", "acc_norm", "acc_bytes", "perplexity")


@dataclass(frozen=True, slots=True)
class Findings:
    """All that one call measured; by the name of the text, and of the task or its group."""

    texts: dict[str, Perplexity]
    divergences: dict[str, Divergence]
    tasks: dict[str, TaskResult]
    groups: dict[str, TaskResult]


def unescaped(text: str) -> str:
    """Parse text in which a backslash and n stand for a line break, t for a tab."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What may be asked of ``edge-memllm eval``."""

    json: Json = False
    yes: Yes = False
    texts: Annotated[TextOptions, Group("texts")]
    reference: Annotated[
        Path | None,
        Option(
            "compare the predictions with this artifact's; it is loaded with the same options, its "
            "table always in full and without overlays",
            metavar="ARTIFACT",
            group="texts",
            needs=("--text",),
        ),
    ] = None
    tasks: Annotated[TaskOptions, Group("tasks")]
    delimiter: Annotated[
        str | None,
        Option(
            "what stands between a context and what follows it, with \\n for a line break",
            metavar="TEXT",
            parse=unescaped,
            unset="one space, or nothing where there is white space already",
            group="tasks",
            needs=("--task",),
        ),
    ] = None
    loading: Annotated[LoadOptions, Group("loading")]


def execute(options: EvalOptions) -> int:
    """Run the command."""
    if not options.texts.text and not options.tasks.task:
        raise RequestError("There is nothing to measure. Give --text FILE or --task FILE.")
    texts = {str(path): read_text(path) for path in options.texts.text}
    limit, delimiter = options.tasks.limit, options.delimiter
    tasks = read_tasks(options.tasks.task, limit=limit, delimiter=delimiter)
    loading, reference = options.loading, None
    with ExitStack() as opened:
        model = opened.enter_context(load_model(loading, yes=options.yes))
        if options.reference is not None:
            # Coarse rows and overlays are what is measured, never what it is measured against.
            loading = replace(loading, path=options.reference, table_quality="full", overlays=())
            reference = opened.enter_context(load_model(loading, yes=options.yes))
        findings = _measure(model, reference, texts, options.texts.windows, tasks)
    if options.json:
        write_json(report(findings))
    else:
        print(page(findings))
    return 0


def _measure(
    model: Model,
    reference: Model | None,
    texts: dict[str, str],
    windows: Windows,
    tasks: Sequence[Task],
) -> Findings:
    perplexities: dict[str, Perplexity] = {}
    divergences: dict[str, Divergence] = {}
    for name, text in texts.items():
        with StageBars() as bars:

            def progress(done: int, total: int, bars: StageBars = bars) -> None:
                bars("tokens", done, total)

            if reference is None:
                perplexities[name] = measure_perplexity(model, text, **windows, progress=progress)
            else:
                found = measure_divergence(model, reference, text, **windows, progress=progress)
                divergences[name], perplexities[name] = found, found.model
    results = _scores(model, tasks)
    return Findings(perplexities, divergences, results, _groups(results))


def _scores(model: Model, tasks: Sequence[Task]) -> dict[str, TaskResult]:
    results: dict[str, TaskResult] = {}
    total, before = sum(len(task.items) for task in tasks), 0
    with StageBars() as bars:
        for task in tasks:

            def progress(done: int, _: int, before: int = before) -> None:
                bars("items", before + done, total)

            results[task.name] = measure_task(model, task, progress)
            before += len(task.items)
    return results


def _groups(results: dict[str, TaskResult]) -> dict[str, TaskResult]:
    names = dict.fromkeys(result.group for result in results.values())
    return {
        name: mean_result(name, [each for each in results.values() if each.group == name])
        for name in names
        if name is not None
    }


def report(findings: Findings) -> dict[str, Any]:
    """Return everything as one JSON object; the figures at the top are of all texts together."""
    if findings.texts:
        found = combine(list(findings.texts.values())).as_dict()
    else:
        found = {"perplexity": None, "nll_per_token": None, "tokens": 0}
    if findings.divergences:
        found["divergence"] = combine_divergences(list(findings.divergences.values())).as_dict()
    return {
        **found,
        "texts": {
            name: text.as_dict() | _divergence(findings, name)
            for name, text in findings.texts.items()
        },
        "tasks": {name: result.as_dict() for name, result in findings.tasks.items()},
        "groups": {name: result.as_dict() for name, result in findings.groups.items()},
    }


def _divergence(findings: Findings, text: str) -> dict[str, Any]:
    found = findings.divergences.get(text)
    return {} if found is None else {"divergence": found.as_dict()}


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


EVAL = Command(EvalOptions, execute, _DESCRIPTION, _EXAMPLES)
