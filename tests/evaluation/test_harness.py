"""The adapter for lm-evaluation-harness; without that package over a base class made here."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import edge_memllm
from edge_memllm import Model, RequestError, RuntimeUnavailableError, Sampling
from edge_memllm.evaluation import measure_perplexity, measure_task, read_tasks
from edge_memllm.evaluation.tasks import Scorer
from support import HARNESS
from support.checkpoints import EOS, MakeArtifact
from support.small_model import CONTEXT, ScriptedRuntime, open_small_model, write_small_artifact

FOLDER = HARNESS
INSTALLED = importlib.util.find_spec("lm_eval") is not None
ADAPTER = "edge_memllm.evaluation.harness"


class Hook:
    """Keeps what would go into the harness's cache."""

    def __init__(self) -> None:
        self.kept: list[tuple[Any, ...]] = []

    def add_partial(self, *entry: Any) -> None:
        self.kept.append(entry)


class Base:
    """As much of `lm_eval.api.model.LM` as a subclass can see."""

    def __init__(self) -> None:
        self.cache_hook = Hook()


@pytest.fixture(scope="module")
def harness() -> Iterator[Any]:
    """The adapter's module, over the real package or over the base above."""
    with pytest.MonkeyPatch.context() as patch:
        if not INSTALLED:
            names = ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.registry")
            for name in names:
                patch.setitem(sys.modules, name, ModuleType(name))
            sys.modules[names[2]].LM = Base  # type: ignore[attr-defined]
            sys.modules[names[3]].register_model = lambda name: lambda found: found  # type: ignore[attr-defined]
        module = importlib.import_module(ADAPTER)
        yield module
        if not INSTALLED:
            del sys.modules[ADAPTER]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_artifact(tmp_path_factory.mktemp("harness") / "a").path


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[Model]:
    with open_small_model(path) as opened:
        yield opened


@pytest.fixture
def adapter(harness: Any, model: Model) -> Any:
    found = harness.EdgeMemLM(model)
    found.cache_hook = Hook()
    return found


def requests(*arguments: Any) -> list[Any]:
    return [SimpleNamespace(args=each) for each in arguments]


def test_likelihoods_are_those_of_the_scorer(adapter: Any, model: Model) -> None:
    arguments = [
        ("The sky is", " blue"),
        ("The sky is", " green"),
        ("", " A sentence."),
        ("The sky is", " red"),
    ]
    found = adapter.loglikelihood(requests(*arguments))
    for (context, continuation), answer in zip(arguments, found, strict=True):
        with Scorer(model) as scorer:
            (expected,) = scorer.score_texts(context, [continuation])
        assert answer == (expected.logprob, expected.greedy)
    assert adapter.cache_hook.kept == [
        ("loglikelihood", each, answer) for each, answer in zip(arguments, found, strict=True)
    ]


def test_long_contexts_are_told(adapter: Any, caplog: pytest.LogCaptureFixture) -> None:
    adapter.loglikelihood(requests(("x" * 200, " a"), ("x", " a")))
    assert "1 of 2 contexts were too long and lost their beginning" in caplog.text


@given(count=st.integers(1, 60), most=st.integers(1, 20))
def test_each_token_is_predicted_once(harness: Any, count: int, most: int) -> None:
    tokens = list(range(count))
    seen = []
    for context, continuation in harness.rolling_windows(tokens, most):
        assert context
        assert len(context) + len(continuation) - 1 <= most
        window = tokens[context[0] : continuation[-1] + 1]
        assert context + continuation == window
        # As much as fits, or as there is.
        assert len(window) == most + 1 or context[0] == 0
        seen += continuation
    assert seen == tokens[1:]


def test_the_windows_of_the_harness_own_example(harness: Any) -> None:
    tokens = ["BOS", *range(10)]
    assert list(harness.rolling_windows(tokens, 4)) == [
        (["BOS"], [0, 1, 2, 3]),
        ([3], [4, 5, 6, 7]),
        ([5, 6, 7], [8, 9]),
    ]


def test_a_rolling_text_has_the_loss_of_its_perplexity(adapter: Any, model: Model) -> None:
    texts = ["A short text.", "x" * (2 * CONTEXT)]
    found = adapter.loglikelihood_rolling(requests(*((text,) for text in texts)))
    for text, value in zip(texts, found, strict=True):
        alone = measure_perplexity(model, text, context=CONTEXT, stride=CONTEXT)
        assert value == pytest.approx(-alone.nll, rel=1e-6)
    assert adapter.cache_hook.kept[0] == ("loglikelihood_rolling", (texts[0],), found[0])


def test_an_empty_text_costs_nothing(adapter: Any) -> None:
    assert adapter.loglikelihood_rolling(requests(("",))) == [0.0]


def test_generation_stops_at_a_stop_string(harness: Any, path: Path) -> None:
    with open_small_model(path) as letters:
        script = [*letters.tokenize("blue. And"), EOS]
    with open_small_model(path, ScriptedRuntime(script, prompt_length=3)) as model:
        adapter = harness.EdgeMemLM(model)
        arguments = [("sky", {"until": until}) for until in ([".", "!"], ".", None)]
        arguments.append(("sky", {"until": [], "max_gen_toks": 2}))
        assert adapter.generate_until(requests(*arguments)) == ["blue", "blue", "blue. And", "bl"]


def test_a_long_prompt_loses_its_beginning(
    adapter: Any, model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"max_gen_toks": 28}
    long, short = adapter.generate_until(
        requests(("x" * 50 + "y" * 100, options), ("y" * 100, options))
    )
    assert long == short
    assert "a prompt of 150 tokens was too long and lost its beginning" in caplog.text


def test_no_room_for_a_prompt_is_refused(adapter: Any) -> None:
    with pytest.raises(RequestError, match="max_gen_toks is 128, and the model's context of 128"):
        adapter.generate_until(requests(("x", {"max_gen_toks": 128})))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (None, [], Sampling())),
        ({"until": "\n", "do_sample": False, "temperature": 0.7}, (None, ["\n"], Sampling())),
        ({"max_new_tokens": 5, "temperature": 0.7}, (5, [], Sampling(temperature=0.7))),
        (
            {"max_tokens": 5, "do_sample": True, "top_p": 0.9},
            (5, [], Sampling(temperature=1.0, top_p=0.9)),
        ),
        ({"repetition_penalty": 1.2}, (None, [], Sampling(repetition_penalty=1.2))),
    ],
)
def test_generation_options(harness: Any, options: dict[str, Any], expected: Any) -> None:
    assert harness.generation_options(options) == expected


def test_an_unknown_generation_option_is_refused(harness: Any) -> None:
    with pytest.raises(RequestError, match="Unknown generation option 'num_beams', expected until"):
        harness.generation_options({"num_beams": 4})


def test_chat_templates(adapter: Any, model: Model, harness: Any, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    with pytest.raises(RequestError, match="The artifact has no chat template"):
        adapter.apply_chat_template(messages)
    made = write_small_artifact(tmp_path / "b", chat_template__jinja=b"{{messages[0].content}}!")
    with open_small_model(made.path) as chatty:
        assert harness.EdgeMemLM(chatty).apply_chat_template(messages) == "Hi!"
    assert adapter.tokenizer_name == model.manifest.files["tokenizer.json"].sha256


def test_it_opens_an_artifact_or_takes_a_model(
    harness: Any, make_artifact: MakeArtifact, model: Model
) -> None:
    passed = {"batch_size": 1, "max_batch_size": None, "device": "cuda:0"}
    opened = harness.EdgeMemLM(str(make_artifact()), **passed, reader="ram", threads=1)
    assert opened.model.reader == "ram"
    opened.close()
    with pytest.raises(RequestError, match="The model is closed"):
        opened.model.generate("a", max_new_tokens=1)
    given = harness.EdgeMemLM(model)
    given.close()
    assert model.generate("a", max_new_tokens=1) is not None
    with pytest.raises(RequestError, match="'reader' is for loading, and the model is open"):
        harness.EdgeMemLM(model, reader="ram")


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, ADAPTER, raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(RuntimeUnavailableError, match=r"pip install '\.\[eval\]'"):
        importlib.import_module(ADAPTER)


# with the real package: the same artifact scores the same both ways


def test_a_task_that_does_not_say_gets_half_the_context(adapter: Any, model: Model) -> None:
    (found,) = adapter.generate_until(requests(("x" * 90, {})))
    expected = model.generate("x" * 64, max_new_tokens=64, sampling=Sampling())
    assert found == expected


@pytest.mark.skipif(not INSTALLED, reason="lm-evaluation-harness is not installed")
@pytest.mark.filterwarnings("ignore")
def test_the_harness_gives_the_same_scores(
    make_artifact: MakeArtifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, harness: Any
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.chdir(FOLDER)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    files = sorted(FOLDER.glob("*.jsonl"))
    with edge_memllm.load(make_artifact(), threads=1) as model:
        theirs = simple_evaluate(
            harness.EdgeMemLM(model),
            tasks=[f"local_{file.stem}" for file in files],
            task_manager=TaskManager(include_path=str(FOLDER), include_defaults=False),
            bootstrap_iters=0,
        )["results"]
        for file in files:
            delimiter = "\nAnswer: " if file.stem == "choices" else None
            (task,) = read_tasks([file], delimiter=delimiter)
            ours = measure_task(model, task)
            assert ours.scores.keys() == {
                name.removesuffix(",none")
                for name in theirs[f"local_{file.stem}"]
                if name.endswith(",none") and "stderr" not in name
            }
            for name, score in ours.scores.items():
                found = theirs[f"local_{file.stem}"][f"{name},none"]
                assert found == pytest.approx(score.value, rel=1e-9), file.stem


def test_the_tasks_of_the_harness_can_go_wrong(model: Model) -> None:
    """A comparison in which every answer were right, or none, would show nothing."""
    for file in ("pairs", "choices"):
        (task,) = read_tasks([FOLDER / f"{file}.jsonl"], delimiter=" ")
        assert 0 < measure_task(model, task).scores["acc"].value < 1
