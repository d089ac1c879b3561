"""What the files beside tokenizer.json say of tokens: encoding as transformers does with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from edge_memllm.artifact.folder import Artifact
from edge_memllm.errors import ArtifactError
from edge_memllm.text.tokenization import Tokenizer
from support.checkpoints import raw_byte_tokenizer
from support.small_model import write_small_artifact

TEXTS = [
    "",
    "plain text",
    "<s>a</s> b",
    "<extra> <|im_end|>x<|other|>",
    " <image>é 東<unk>  ",
    "<pad><tool>",
]
Files = dict[str, dict[str, Any]]


def library(**changes: Any) -> dict[str, Any]:
    """The fields of a tokenizer.json of bytes, which has <s>, </s> and <pad>."""
    made = raw_byte_tokenizer()
    made.add_tokens(["<tool>"])
    return json.loads(made.to_str()) | changes


def processed() -> dict[str, Any]:
    made = raw_byte_tokenizer()
    made.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A $B", special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    return json.loads(made.to_str())


def added(content: str, **flags: bool) -> dict[str, Any]:
    plain = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized", "special"), False)
    return {"content": content, **plain, **flags}


CONFIG = "tokenizer_config.json"
VARIANTS: dict[str, tuple[dict[str, Any], Files]] = {
    "nothing": (library(), {CONFIG: {}}),
    "named": (library(), {CONFIG: {"bos_token": "<s>", "eos_token": "</s>"}}),
    "new names": (library(), {CONFIG: {"eos_token": "<|im_end|>", "unk_token": "<unk>"}}),
    "own names": (library(), {CONFIG: {"image_token": "<image>", "eos_token": "</s>"}}),
    "extra list": (library(), {CONFIG: {"extra_special_tokens": ["<extra>", "<|other|>"]}}),
    "old extra list": (library(), {CONFIG: {"additional_special_tokens": ["<extra>", "<tool>"]}}),
    "extra names": (library(), {CONFIG: {"extra_special_tokens": {"end_token": "<|im_end|>"}}}),
    "added": (
        library(),
        {
            CONFIG: {
                "added_tokens_decoder": {
                    "260": added("<|im_end|>", special=True),
                    "261": added("<extra>", lstrip=True, rstrip=True),
                },
                "eos_token": "<|im_end|>",
            }
        },
    ),
    "map": (
        library(),
        {
            CONFIG: {"bos_token": "<s>"},
            "special_tokens_map.json": {
                "eos_token": {**added("<|im_end|>", rstrip=True)},
                "extra_special_tokens": ["<extra>"],
            },
        },
    ),
    "map unread": (
        library(),
        {
            CONFIG: {"added_tokens_decoder": {"259": added("<tool>")}},
            "special_tokens_map.json": {"eos_token": "<|im_end|>"},
        },
    ),
    "split": (library(), {CONFIG: {"split_special_tokens": True, "eos_token": "</s>"}}),
    "post-processor": (processed(), {CONFIG: {"add_bos_token": False, "add_eos_token": False}}),
    "asked for": (library(), {CONFIG: {"add_bos_token": True, "bos_token": "<s>"}}),
    "prefix space": (library(), {CONFIG: {"add_prefix_space": True}}),
    "cut": (
        library(
            truncation={
                "direction": "Left",
                "max_length": 4,
                "strategy": "LongestFirst",
                "stride": 0,
            }
        ),
        {CONFIG: {"model_max_length": 4, "padding_side": "left"}},
    ),
    "padded": (
        library(
            padding={
                "strategy": {"Fixed": 20},
                "direction": "Left",
                "pad_to_multiple_of": 8,
                "pad_id": 258,
                "pad_type_id": 0,
                "pad_token": "<pad>",
            }
        ),
        {CONFIG: {"pad_token": "<pad>"}},
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_texts_are_encoded_as_transformers_encodes_them(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    fields, files = VARIANTS[name]
    folder = tmp_path / "reference"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    for file, content in files.items():
        content = {"tokenizer_class": "PreTrainedTokenizerFast"} | content
        (folder / file).write_text(json.dumps(content if file == CONFIG else files[file]))
    reference = AutoTokenizer.from_pretrained(folder)

    contents = {
        path.name.replace(".", "__"): path.read_bytes() for path in sorted(folder.iterdir())
    }
    with Artifact.open(write_small_artifact(tmp_path / "a", **contents).path) as artifact:
        tokenizer = Tokenizer.from_artifact(artifact)
    for text in TEXTS:
        assert tokenizer.encode(text) == reference.encode(text), text
        plain = reference.encode(text, add_special_tokens=False)
        assert tokenizer.encode(text, special=False) == plain, text
        assert tokenizer.decode(plain) == reference.decode(plain, skip_special_tokens=True), text
    assert tokenizer.named_tokens == reference.special_tokens_map


@pytest.mark.parametrize(
    "config",
    [
        {"eos_token": 3},
        {"eos_token": {"text": "x"}},
        {"added_tokens_decoder": {"x": {}}},
        {"added_tokens_decoder": [1]},
        {"extra_special_tokens": 5},
        {"extra_special_tokens": "<a>"},
        {"additional_special_tokens": "<a>"},
        {"extra_special_tokens": [["a"]]},
    ],
)
def test_tokens_that_are_none_are_refused(config: dict[str, Any], tmp_path: Path) -> None:
    made = write_small_artifact(tmp_path / "a", tokenizer_config__json=json.dumps(config).encode())
    with (
        Artifact.open(made.path) as artifact,
        pytest.raises(ArtifactError, match=r"tokenizer_config\.json: what it says of tokens"),
    ):
        Tokenizer.from_artifact(artifact)
