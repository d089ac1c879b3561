"""The tokens that tokenizer_config.json and special_tokens_map.json name.

They are read as transformers reads them, and added to those of tokenizer.json; chat templates may
use their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer

from edge_memllm.tokenizer_file import library_errors

CONFIG_FILE = "tokenizer_config.json"
TOKENS_FILE = "special_tokens_map.json"
# In the order in which they get ids, where the vocabulary lacks them.
_NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_EXTRA, _OLD_EXTRA = "extra_special_tokens", "additional_special_tokens"
_ADDED = "added_tokens_decoder"


class TokenizerConfig:
    """The tokens that have a name, those that are special besides, and those merely added."""

    def __init__(self, config: Mapping[str, Any], tokens: Mapping[str, Any]) -> None:
        """Take the objects of the two files. Raises `ArtifactError` for tokens that are none."""
        fields = {**config} if _ADDED in config else {**config, **tokens}
        with library_errors(f"{CONFIG_FILE}: what it says of tokens cannot be read"):
            added = sorted((int(number), each) for number, each in fields.get(_ADDED, {}).items())
            self._added = [AddedToken(**each) for _, each in added]
            known = {each.content: each for each in self._added}
            extra = fields.get(_EXTRA) or fields.get(_OLD_EXTRA) or []
            named = {name: fields[name] for name in _NAMES if fields.get(name) is not None}
            named |= {name: each for name, each in fields.items() if _is_named(name, each)}
            if isinstance(extra, str):
                raise TypeError(f"{extra!a:.80} is a text, expected a list of tokens")
            if isinstance(extra, dict):
                named, extra = named | extra, []
            self._named = {name: _token(each, known) for name, each in named.items()}
            self._extra = [_token(each, known) for each in extra]
        self._splits = bool(fields.get("split_special_tokens", False))

    @property
    def named(self) -> dict[str, str]:
        """What bos_token, eos_token and the like are."""
        return {name: token.content for name, token in self._named.items()}

    def apply(self, tokenizer: Tokenizer) -> None:
        """Add the tokens. Raises `ArtifactError`."""
        with library_errors(f"{CONFIG_FILE}: its tokens cannot be added"):
            present = tokenizer.get_added_tokens_decoder().values()
            known = {repr(token) for token in present}
            new = [token for token in self._added if repr(token) not in known]
            names = {token.content for token in (*present, *new)}
            special = [*self._named.values(), *self._extra]
            tokenizer.add_tokens(new + [token for token in special if token.content not in names])
            tokenizer.encode_special_tokens = self._splits


def _is_named(name: str, value: object) -> bool:
    """Whether a field is a token with a name of the model's own, such as image_token."""
    return name not in _NAMES and name.endswith("_token") and isinstance(value, str)


def _token(value: object, known: Mapping[str, AddedToken]) -> AddedToken:
    """A special token that is written as a text or as an object."""
    if isinstance(value, str):
        return known.get(value) or AddedToken(value, special=True)
    fields = dict(value)  # type: ignore[call-overload]
    fields.pop("__type", None)
    return known.get(fields["content"]) or AddedToken(**{**fields, "special": True})
