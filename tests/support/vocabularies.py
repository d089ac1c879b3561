"""A tokenizer of the form that Gemma has, small: every split of an entry is a merge, as there."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

TEXT = (
    "The naïve café — 東京 is far; the river is not. Then, there: the other thing.\n"
    "def there(the):\n\treturn {'then': [the, 10.5]}\n\n  one two  three   four    the end"
)
ADDED = {
    "<pad>": True,
    "<eos>": True,
    "<bos>": True,
    "\n": False,
    "\n\n": False,
    "\n\n\n": False,
    "<h": False,
    "<h1>": False,
    "<turn|>": True,
}


@cache
def gemma_like(entries: int = 320) -> str:
    """The text of its tokenizer.json; ids: bytes, added tokens, letters, then what is merged."""
    from tokenizers import Tokenizer, models, trainers

    trained = Tokenizer(models.BPE())
    words = TEXT.replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=entries, show_progress=False)
    trained.train_from_iterator([words] * 3, trainer)
    learned = json.loads(trained.to_str())["model"]["vocab"]
    names = [*ADDED, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned]
    vocabulary = {name: place for place, name in enumerate(dict.fromkeys(names))}
    fields = json.loads(trained.to_str()) | {
        "added_tokens": [
            {"id": vocabulary[name], "content": name, "special": special, **_PLAIN}
            for name, special in ADDED.items()
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": _SPLIT,
        "post_processor": _around("<bos>", vocabulary["<bos>"]),
        "decoder": {"type": "Sequence", "decoders": _DECODERS},
        "model": _model(vocabulary, list(learned)),
    }
    return json.dumps(fields)


def changed(definition: str, **parts: Any) -> str:
    """A tokenizer.json with other parts; `model__name` is a field of the model."""
    fields = json.loads(definition)
    for name, value in parts.items():
        inner, _, field = name.partition("__")
        if field:
            fields[inner][field] = value
        else:
            fields[inner] = value
    return json.dumps(fields)


_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
_SPLIT = {
    "type": "Split",
    "pattern": {"String": " "},
    "behavior": "MergedWithPrevious",
    "invert": False,
}
_DECODERS = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]


def _around(name: str, token: int) -> dict[str, Any]:
    special = {"SpecialToken": {"id": name, "type_id": 0}}
    text = [{"Sequence": {"id": letter, "type_id": 0}} for letter in "AB"]
    return {
        "type": "TemplateProcessing",
        "single": [special, text[0]],
        "pair": [special, *text],
        "special_tokens": {name: {"id": name, "ids": [token], "tokens": [name]}},
    }


def _model(vocabulary: dict[str, int], learned: list[str]) -> dict[str, Any]:
    """Merges by what they make, the longest of a run first: ranks do not ascend with length."""
    known = set(learned)
    merges = [
        [name[:cut], name[cut:]]
        for name in sorted(learned, key=lambda each: (len(set(each)) > 1, vocabulary[each]))
        for cut in range(1, len(name))
        if name[:cut] in known and name[cut:] in known
    ]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": "<unk>",
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": merges,
    }
