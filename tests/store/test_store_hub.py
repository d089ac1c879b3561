"""Models of the Hub that are no artifacts: downloaded, exported, and then asked for no more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edge_memllm.errors import ArtifactError
from edge_memllm.store import ExportPlan, Store, artifact_of
from support.hub import NAME, FakeHub
from support.small_model import write_small_artifact
from support.store import FakeExporter

Get = Callable[..., Path]
CHECKPOINT = {"config.json": b"{}", "model.safetensors": bytes(4000), "README.md": b"# words"}
FILES = {
    "some.Q4_K_M.gguf": b"GGUF 4",
    "some.Q4_K_S.gguf": b"GGUF s",
    "some.Q8_0.gguf": b"GGUF 88",
    "mmproj-some-Q8_0.gguf": b"GGUF p",
}


@pytest.fixture
def hub(home: Path, empty_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    monkeypatch.chdir(home)
    return empty_hub


def test_a_checkpoint_is_downloaded_and_exported_once(
    hub: FakeHub, get: Get, exporter: FakeExporter
) -> None:
    hub.files[NAME] = CHECKPOINT
    made = get(NAME)
    ((path, _),) = exporter.made
    assert {file.name for file in path.iterdir()} == {"config.json", "model.safetensors"}
    hub.asked.clear()
    assert get(NAME) == get(f"hf://{NAME}") == get(Path(f"hf://{NAME}")) == made
    assert hub.asked == []
    assert list(Store.of_user().names()) == [NAME]


def test_an_artifact_of_the_hub_is_no_source(
    hub: FakeHub, tmp_path: Path, get: Get, exporter: FakeExporter
) -> None:
    hub.add_folder(NAME, write_small_artifact(tmp_path / "made").path)
    assert (get(NAME) / "manifest.json").is_file()
    assert exporter.made == []
    assert Store.of_user().entries() == []


def test_the_variant_says_which_gguf_file(hub: FakeHub, get: Get, exporter: FakeExporter) -> None:
    hub.files[NAME] = FILES | {"config.json": b"{}"}
    assert get(f"{NAME}:Q8_0") != get(f"hf://{NAME}@v1:q4_k_m")
    assert [path.name for path, _ in exporter.made] == ["some.Q8_0.gguf", "some.Q4_K_M.gguf"]
    assert hub.downloads() == ["some.Q8_0.gguf", "some.Q4_K_M.gguf"]


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        (NAME, FILES, rf"{NAME}: there are 3 GGUF files, .*Name one .*{NAME}:Q8_0"),
        (f"{NAME}:Q4_K", FILES, "has no GGUF file of the variant 'Q4_K'. It has: mmproj"),
        (NAME, {"README.md": b""}, r"no checkpoint .* has no GGUF file\. It has: README\.md"),
    ],
)
def test_a_model_that_nothing_can_be_made_of(
    name: str, files: dict[str, bytes], message: str, hub: FakeHub, get: Get
) -> None:
    hub.files[NAME] = files
    with pytest.raises(ArtifactError, match=message):
        get(name)
    assert Store.of_user().entries() == []


def test_it_is_asked_before_anything_large_is_downloaded(
    hub: FakeHub, exporter: FakeExporter
) -> None:
    hub.files[NAME] = CHECKPOINT
    plans: list[ExportPlan] = []

    def permit(plan: ExportPlan) -> None:
        plans.append(plan)
        raise ArtifactError("No.")

    with pytest.raises(ArtifactError, match="No"):
        artifact_of(NAME, {}, permit)
    assert plans[0].facts.download == 4000
    assert hub.downloads() == []
    assert exporter.made == []


def test_a_model_that_is_not_there(hub: FakeHub, get: Get) -> None:
    with pytest.raises(ArtifactError, match="no such model on the Hugging Face Hub"):
        get("some/other")
