from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from edge_memllm import Model, RequestError
from edge_memllm.evaluation import Item, Kind, Score, Task, TaskResult, mean_result, measure_task
from edge_memllm.evaluation.tasks import Likelihood, Scorer
from support.small_model import CONTEXT, open_small_model, write_small_artifact


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    made = write_small_artifact(tmp_path_factory.mktemp("tasks") / "a")
    with open_small_model(made.path) as opened:
        yield opened


def scripted(monkeypatch: pytest.MonkeyPatch, *answers: Sequence[float]) -> None:
    """Let the scorer give these log-probabilities, context by context; below -9 is not greedy."""
    waiting = iter(answers)

    def score(self: Scorer, context: str, continuations: Sequence[str]) -> list[Likelihood]:
        found = next(waiting)
        assert len(found) == len(continuations)
        return [Likelihood(value, value > -9, False) for value in found]

    monkeypatch.setattr(Scorer, "score_texts", score)


def test_the_accuracies_of_multiple_choice(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    # Characters and bytes: "abcd" 4 and 4, "éé" 2 and 4, "e" 1 and 1.
    item = Item(("?",), ("abcd", "éé", "e"), 1)
    right = Item(("?",), ("abcd", "éé", "e"), 2)
    scripted(monkeypatch, [-8.0, -5.0, -2.0], [-8.0, -5.0, -2.0])
    found = measure_task(model, Task("t", "choices", (item, right)))
    # Sums: the third. Per character: -2, -2.5, -2: the first. Per byte: -2, -1.25, -2: the second.
    values = {name: score.value for name, score in found.scores.items()}
    assert values == {"acc": 0.5, "acc_norm": 0, "acc_bytes": 0.5}
    assert found.items == 2


def test_contexts_compare_one_continuation(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    items = tuple(Item(("a", "b"), ("c",), answer) for answer in (0, 1))
    scripted(monkeypatch, [-2.0], [-1.0], [-2.0], [-1.0])
    found = measure_task(model, Task("t", "contexts", items))
    assert found.scores == {"acc": Score(0.5, pytest.approx(0.5))}


def test_pairs_are_right_where_the_good_one_is_likelier(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, [-2.0, -3.0], [-3.0, -2.0], [-5.0, -9.0], [-1.0, -1.5])
    items = (Item((" ",), ("good", "bad")),) * 4
    found = measure_task(model, Task("t", "pairs", items))
    assert found.scores["acc"] == Score(0.75, pytest.approx(math.sqrt(0.75 * 0.25 / 3)))


def test_a_continuation_is_right_where_it_is_greedy(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    nats = np.array([2.0, 1.0, 12.0])
    scripted(monkeypatch, *([-value] for value in nats))
    found = measure_task(model, Task("t", "continuation", (Item(("a",), ("b",)),) * 3))
    assert found.scores["acc"].value == pytest.approx(2 / 3)
    error = nats.std(ddof=1) / math.sqrt(3)
    assert found.scores["perplexity"] == Score(
        pytest.approx(math.exp(5)), pytest.approx(math.exp(5) * error)
    )


def test_a_task_is_scored_by_the_model(model: Model) -> None:
    items = (
        Item(("The sky is ",), ("blue", "made of cheese", "up"), 0),
        Item(("Two and two are ",), ("four", "five"), 1),
    )
    seen: list[tuple[int, int]] = []
    found = measure_task(model, Task("t", "choices", items), lambda *counts: seen.append(counts))
    right = 0
    for item in items:
        with Scorer(model) as scorer:
            sums = [
                each.logprob for each in scorer.score_texts(item.contexts[0], item.continuations)
            ]
        right += int(np.argmax(sums)) == item.answer
    assert found.scores["acc"].value == right / 2
    assert seen == [(1, 2), (2, 2)]
    assert measure_task(model, Task("t", "choices", items)) == found


def test_long_contexts_are_counted(model: Model) -> None:
    items = (Item(("x" * CONTEXT,), ("ab", "c"), 0), Item(("x",), ("ab", "c"), 0))
    found = measure_task(model, Task("t", "choices", items))
    assert found.truncated == 1  # "c" still has room: its one token is not fed


def test_an_item_that_does_not_fit_is_named(model: Model) -> None:
    items = (Item(("x",), ("a", "b")), Item(("x",), ("a" * (CONTEXT + 1), "b")))
    with pytest.raises(RequestError, match="long, item 2: A continuation has 129 tokens"):
        measure_task(model, Task("long", "choices", items))


def test_one_item_has_no_standard_error(model: Model) -> None:
    found = measure_task(model, Task("t", "pairs", (Item((" ",), ("a", "b")),)))
    assert found.scores["acc"].stderr is None
    assert found.as_dict()["acc_stderr"] is None


def result(kind: Kind, items: int, **scores: Score) -> TaskResult:
    return TaskResult("t", kind, items, 1, scores, "g")


def test_the_mean_of_a_group_counts_tasks_not_items() -> None:
    found = mean_result(
        "g", [result("pairs", n, acc=Score(v, 0.03)) for n, v in ((10, 0.5), (90, 1))]
    )
    assert found.kind == "pairs"
    assert (found.items, found.truncated) == (100, 2)
    assert found.scores["acc"].value == 0.75
    assert found.scores["acc"].stderr == pytest.approx(0.03 / math.sqrt(2))


def test_the_mean_of_unlike_tasks_has_what_they_share() -> None:
    found = mean_result(
        "g",
        [
            result("continuation", 5, acc=Score(0.2, None), perplexity=Score(9.0, 1.0)),
            result("choices", 5, acc=Score(0.4, 0.1), acc_norm=Score(0.1, 0.1)),
        ],
    )
    assert found.kind == "mixed"
    assert found.scores == {"acc": Score(pytest.approx(0.3), None)}


def test_perplexities_are_not_averaged() -> None:
    one = result("continuation", 5, acc=Score(0.2, 0.1), perplexity=Score(9.0, 1.0))
    assert list(mean_result("g", [one, one]).scores) == ["acc"]
