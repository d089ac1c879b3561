from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edge_memllm.errors import RequestError
from edge_memllm.hub import HubModel, artifact_folder, checkpoint_folder


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("org/name", HubModel("org/name")),
        (Path("org/name"), HubModel("org/name")),
        ("hf://org/name", HubModel("org/name")),
        (Path("hf://org/name@v1.0"), HubModel("org/name", "v1.0")),
        ("hf://o-r_g/n.a-m@refs/pr/1", HubModel("o-r_g/n.a-m", "refs/pr/1")),
        ("artifact", None),
        ("./org/name", None),
        ("../org/name", None),
        ("/org/name", None),
        ("a/b/c", None),
        ("org\\name", None),
        ("org/name/", None),
        (".org/name", None),
        ("", None),
    ],
)
def test_what_is_a_name_of_the_hub(source: Any, expected: HubModel | None) -> None:
    assert HubModel.parse(source) == expected


@pytest.mark.parametrize("resolve", [artifact_folder, checkpoint_folder])
def test_a_folder_is_itself_and_has_no_revision(resolve: Any, tmp_path: Path) -> None:
    assert resolve(tmp_path) == tmp_path
    assert resolve("nothing") == Path("nothing")
    with pytest.raises(RequestError, match=r"this is a folder, and revision 'v1' is for models"):
        resolve(tmp_path, revision="v1")


def test_a_model_is_written_as_it_was_named() -> None:
    assert str(HubModel("org/name")) == "org/name"
    assert str(HubModel("org/name", "v1")) == "org/name@v1"
    assert HubModel.wanted("hf://org/name@v1", "v2") == HubModel("org/name", "v2")


@pytest.mark.parametrize(
    "source", ["hf://", "hf://name", "hf://a/b/c", "hf://a/b@", "hf://a/../b", "hf:///a/b c"]
)
def test_a_misspelt_name_is_refused(source: str) -> None:
    with pytest.raises(
        RequestError, match=r"^hf://.*: not the name of a model.*expected hf://org/"
    ):
        HubModel.parse(source)
