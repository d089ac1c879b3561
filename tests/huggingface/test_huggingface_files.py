from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from edge_memllm.errors import ArtifactError, RequestError, RuntimeUnavailableError
from edge_memllm.huggingface import EdgeMemLLMForCausalLM
from support.checkpoints import EOS, MakeCheckpoint, files_of
from support.hub import EXACT, GREEDY, FakeHub, ids


def test_saved_is_the_same_artifact(
    model: EdgeMemLLMForCausalLM, path: Path, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "deep" / "saved")
    assert files_of(tmp_path / "deep" / "saved") == files_of(path)
    with pytest.raises(RequestError, match=r"saved: is not an empty folder, and nothing is repl"):
        model.save_pretrained(tmp_path / "deep" / "saved")
    with pytest.raises(RequestError, match=r"repo_id: only for an upload\. Give push_to_hub=True"):
        model.save_pretrained(tmp_path / "other", repo_id="a/b")


def test_changed_defaults_are_not_lost_silently(path: Path, tmp_path: Path) -> None:
    with EdgeMemLLMForCausalLM.from_pretrained(path, threads=1) as opened:
        opened.generation_config.temperature = 0.3
        with pytest.raises(RequestError, match=r"generation_config was changed.*export it"):
            opened.save_pretrained(tmp_path / "saved")
        assert not (tmp_path / "saved").exists()


class RecordingApi:
    """Stands for `huggingface_hub.HfApi`: what was uploaded, and where."""

    calls: list[tuple[str, dict[str, Any]]]

    def __init__(self, **options: Any) -> None:
        self.calls.append(("made", options))

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.calls.append(("create", {"repo_id": repo_id, **options}))
        if repo_id == "no/way":
            raise ConnectionError("no network today")
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, **options: Any) -> None:
        self.calls.append(("upload", options))


def test_an_upload_is_the_artifact_and_nothing_else(
    model: EdgeMemLLMForCausalLM, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", RecordingApi)
    monkeypatch.setattr(RecordingApi, "calls", [], raising=False)
    model.save_pretrained(
        tmp_path / "saved", push_to_hub=True, repo_id="some/model", token="t", private=True
    )
    calls = dict(RecordingApi.calls)
    assert calls["made"]["token"] == "t"
    assert calls["create"] == {"repo_id": "some/model", "private": True, "exist_ok": True}
    assert set(calls["upload"]["allow_patterns"]) == {file.name for file in path.iterdir()}
    assert calls["upload"]["folder_path"] == path
    with pytest.raises(ArtifactError, match=r"^no/way: .*no network today"):
        model.push_to_hub("no/way")


def test_a_name_of_the_hub_is_loaded(
    path: Path, tmp_path: Path, empty_hub: FakeHub, model: EdgeMemLLMForCausalLM
) -> None:
    empty_hub.token = "hf_mine"
    empty_hub.add_folder("some/model", path)
    options = {"revision": "v1", "token": "hf_mine", "cache_dir": tmp_path / "here"}
    with EdgeMemLLMForCausalLM.from_pretrained("some/model", threads=1, **options) as opened:
        assert tmp_path / "here" in opened.path.parents
        assert opened.config.name_or_path == str(opened.path)
        assert torch.equal(opened.generate(ids("x"), **GREEDY), model.generate(ids("x"), **GREEDY))


@pytest.mark.parametrize(
    "options",
    [
        {"trust_remote_code": True, "low_cpu_mem_usage": True, "use_safetensors": True},
        {"dtype": "auto", "attn_implementation": None, "quantization_config": None},
        {"torch_dtype": torch.float32, "load_in_4bit": False, "subfolder": "", "config": None},
        {"device_map": "auto", "revision": "main", "max_memory": None, "_commit_hash": None},
        {"device_map": {"": "cpu"}, "device": "cpu"},
        {"device_map": torch.device("cpu"), "output_loading_info": False},
    ],
)
def test_options_of_transformers_that_ask_for_what_is_the_case_are_taken(
    options: dict[str, Any], path: Path
) -> None:
    with EdgeMemLLMForCausalLM.from_pretrained(path, threads=1, **options) as opened:
        assert opened.model.device == "cpu"
        assert opened.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.float16}, r"dtype is torch\.float16: logits are float32, .* Leave it out"),
        ({"torch_dtype": "bfloat16"}, "torch_dtype is 'bfloat16': logits are float32"),
        ({"attn_implementation": "sdpa"}, "attn_implementation is 'sdpa': the graph has an"),
        ({"load_in_8bit": True}, "load_in_8bit is True: how weights are stored was chosen"),
        ({"low_cpu_mem_usage": "much"}, "low_cpu_mem_usage is 'much'"),
        ({"use_safetensors": False}, "pickles are never read"),
        ({"subfolder": "onnx"}, "subfolder is 'onnx': give the folder of the artifact itself"),
        ({"output_loading_info": True}, "the model alone is returned"),
        ({"device_map": {"model.layers.0": 0, "lm_head": "cpu"}}, "an artifact is on one device"),
        ({"device_map": "cpu", "device": "cuda"}, "device_map is 'cpu' and device is 'cuda'. Give"),
        ({"device_map": "mps"}, "device_map is 'mps'"),
        ({"thread": 1}, "thread: there is no such option. There are device, reader, threads,"),
    ],
)
def test_options_that_cannot_be_met_are_refused(
    options: dict[str, Any], message: str, path: Path
) -> None:
    with pytest.raises(RequestError, match=message):
        EdgeMemLLMForCausalLM.from_pretrained(path, **options)


def test_a_checkpoint_is_exported_on_the_way(
    make_checkpoint: MakeCheckpoint, path: Path, tmp_path: Path
) -> None:
    with EdgeMemLLMForCausalLM.from_pretrained(
        make_checkpoint(), export=True, export_options=EXACT | {"verify": False}, threads=1
    ) as opened:
        opened.save_pretrained(tmp_path / "saved")
    assert files_of(tmp_path / "saved") == files_of(path)
    assert not opened.path.exists()
    with pytest.raises(RequestError, match=r"export_options are given, and export is not"):
        EdgeMemLLMForCausalLM.from_pretrained(path, export_options={})


def test_the_artifacts_own_defaults_are_generates(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = Path(shutil.copytree(make_checkpoint(), tmp_path / "checkpoint"))
    settings = {"do_sample": True, "temperature": 0.5, "top_k": 7, "eos_token_id": EOS}
    (checkpoint / "generation_config.json").write_text(json.dumps(settings))
    with EdgeMemLLMForCausalLM.from_pretrained(
        checkpoint, export=True, export_options={"verify": False}, threads=1
    ) as opened:
        found = opened.generation_config
        assert (found.do_sample, found.temperature, found.top_k) == (True, 0.5, 7)
        opened.save_pretrained(tmp_path / "saved")


def test_without_optimum_the_error_names_the_extra() -> None:
    code = (
        "import sys\nsys.modules['optimum.modeling_base'] = None\n"
        "from edge_memllm.errors import RuntimeUnavailableError\n"
        "try:\n    import edge_memllm.huggingface\n"
        "except RuntimeUnavailableError as error:\n    print(error)\n"
    )
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert "pip install '.[optimum]'" in done.stdout
    assert issubclass(RuntimeUnavailableError, Exception)
