"""The files of a tokenizer, made of what a GGUF file says of it: ids equal to the original's.

A GGUF file holds the vocabulary and names the rest: which pattern cuts texts into words
(`tokenizer.ggml.pre`), or that the vocabulary is SentencePiece's, whose merges are not stored and
are derived from its order; of Gemma 4 they are stored. What the original said besides is lost to
the format: whether a token that looks special also was, so that decoding may leave out
`<|fim_prefix|>`, which the original shows, or show `<|channel>`, which the original leaves out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from gguf.constants import TokenType

from edge_memllm.errors import ExportError
from edge_memllm.text import CONFIG_FILE, GENERATION_FILE, TEMPLATE_FILE, TOKENIZER_FILE
from edge_memllm.text.chat import DEFAULT_TEMPLATE
from edge_memllm.text.tokenizer_file import MOST_LETTERS, MOST_TOKENS

_MOST_LETTERS = 1 << 23  # of all tokens: the largest vocabularies have two million
_SPACE = "\u2581"  # SentencePiece's mark of a space
# Ends of a text or a turn, beside those that the metadata names; as llama.cpp takes them.
_ENDS = {
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<end_of_turn>", "<|endoftext|>"),
    *("<|eom_id|>", "<|end_of_text|>", "<end_of_utterance>", "<eos>", "</s>", "<turn|>"),
}
_VISIBLE_END = "<|tool_response>"  # of Gemma 4: its files call it no control token
_NAMED = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_SENTENCEPIECE_IDS = {"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_MARKS_AND_SPACES = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{_MARKS_AND_SPACES}"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{_MARKS_AND_SPACES}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class _Words:
    """How a byte-level tokenizer cuts a text into words.

    Attributes:
        patterns: Each cuts the pieces that the one before left.
        composed: Whether letters and their marks are first put together (NFC).
        whole_words: Whether a word that is a token is taken for it, whatever the merges say.
        begins: Whether the beginning of a text is marked where the metadata does not say.
    """

    patterns: tuple[str, ...]
    composed: bool = False
    whole_words: bool = False
    begins: bool = False


_DIGITS_FIRST = _Words((r"\p{N}", _GPT2))
_OF_QWEN2 = _Words((_QWEN2,), composed=True)
_OF_LLAMA3 = _Words((_LLAMA3,), whole_words=True, begins=True)
# What llama.cpp does where its converter did not know the tokenizer.
_UNKNOWN = _Words((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))
_WORDS: Mapping[str, _Words] = {
    "default": _UNKNOWN,
    "gpt-2": _Words((_GPT2,)),
    "smollm": _DIGITS_FIRST,
    "starcoder": _DIGITS_FIRST,
    "refact": _DIGITS_FIRST,
    "qwen2": _OF_QWEN2,
    "deepseek-r1-qwen": _OF_QWEN2,
    "llama-bpe": _OF_LLAMA3,
    "llama3": _OF_LLAMA3,
    "llama-v3": _OF_LLAMA3,
    "falcon3": _OF_LLAMA3,
    "tekken": _Words((_TEKKEN,), whole_words=True, begins=True),
}


class GGUFTokenizer:
    """What the metadata of a file says of text."""

    def __init__(self, metadata: Mapping[str, Any], where: str) -> None:
        """Take the metadata; errors begin with `where`.

        Raises:
            ExportError: There is no tokenizer, one of a kind not read here, or a damaged one.
        """
        self._metadata = metadata
        self._where = where
        self._model = self._checked_model()
        self._sentencepiece = self._model == "llama"
        self._of_gemma = metadata.get("general.architecture") == "gemma3"
        self._words = self._cutting() if self._model == "gpt2" else None
        self._tokens = self._strings("tokens")
        self._check_lengths()
        self._types = self._token_types()
        self._ids = {token: number for number, token in enumerate(self._tokens)}
        if len(self._ids) != len(self._tokens):
            self._refuse("has a token twice.")

    @property
    def size(self) -> int:
        """How many tokens there are, those that stand for nothing included."""
        return len(self._tokens)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a user should know, in sentences."""
        found = []
        if self._words is _UNKNOWN:
            found.append(
                "tokenizer.ggml.pre: the file does not say how its tokenizer cuts texts into "
                "words; they are cut as llama.cpp does then, which may not be what the model "
                "learnt."
            )
        if (kept := self._value("suppress_tokens")) is not None and len(kept):
            found.append(
                f"tokenizer.ggml.suppress_tokens: {len(kept)} tokens that llama.cpp never draws "
                "may be drawn here."
            )
        return tuple(found)

    def special_ids(self) -> dict[str, int | list[int] | None]:
        """The fields of a configuration that name tokens: bos, eos and pad."""
        ends = self._ends()
        return {
            "bos_token_id": self._named_id("bos_token_id"),
            "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
            "pad_token_id": self._named_id("padding_token_id"),
        }

    def files(self) -> dict[str, bytes]:
        """The files of a transformers folder that texts are read by, by their names."""
        named = {
            name: self._tokens[number]
            for name, key in _NAMED.items()
            if (number := self._named_id(key)) is not None
        }
        config: dict[str, Any] = {
            **named,
            "clean_up_tokenization_spaces": False,
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        files = {TOKENIZER_FILE: _json_bytes(self._tokenizer())}
        template, others = self._templates()
        if others:
            config["chat_template"] = [
                {"name": name, "template": text}
                for name, text in {DEFAULT_TEMPLATE: template, **others}.items()
                if text is not None
            ]
        elif template is not None:
            files[TEMPLATE_FILE] = template.encode()
        ids = {name: found for name, found in self.special_ids().items() if found is not None}
        generation = {**ids, **self._sampling()}
        return files | {
            CONFIG_FILE: _json_bytes(config),
            GENERATION_FILE: _json_bytes(generation),
        }

    def _refuse(self, what: str, advice: str = "The file is damaged: get it again.") -> NoReturn:
        raise ExportError(f"{self._where}: the tokenizer {what} {advice}")

    def _value(self, name: str) -> Any:
        return self._metadata.get(f"tokenizer.ggml.{name}")

    def _checked_model(self) -> str:
        """Bytes as letters (gpt2), SentencePiece's (llama), or that with merges (gemma4)."""
        found = self._value("model")
        known = ("gpt2", "llama", "gemma4")
        if found not in known or self._value("precompiled_charsmap") is not None:
            self._refuse(
                f"is of kind {found!a:.40}, expected {', '.join(known[:-1])} or {known[-1]}, "
                "without a map of characters.",
                "Give the model as a folder with a tokenizer.json instead.",
            )
        return str(found)

    def _cutting(self) -> _Words:
        found = self._value("pre")
        if found is None:
            return _UNKNOWN
        if not isinstance(found, str) or found not in _WORDS:
            self._refuse(
                f"cuts words by {found!a:.40}, expected one of {', '.join(_WORDS)}.",
                "Give the model as a folder with a tokenizer.json instead.",
            )
        return _WORDS[found]

    def _strings(self, name: str) -> list[str]:
        found = self._value(name)
        if not isinstance(found, list) or not found:
            self._refuse(f"has no list of texts in tokenizer.ggml.{name}.")
        return found

    def _check_lengths(self) -> None:
        """Every token is cut at each of its letters, so their lengths have to be bounded."""
        lengths = [len(token) for token in self._tokens]
        for what, found, most in (
            ("tokens", len(lengths), MOST_TOKENS),
            ("a token of so many letters", max(lengths), MOST_LETTERS),
            ("tokens of so many letters together", sum(lengths), _MOST_LETTERS),
        ):
            if found > most:
                self._refuse(f"has {what}: {found}, expected at most {most}.")

    def _token_types(self) -> list[int]:
        found = self._value("token_type")
        if not isinstance(found, np.ndarray) or len(found) != len(self._tokens):
            self._refuse(
                f"has {len(self._tokens)} tokens, and tokenizer.ggml.token_type not as many types."
            )
        types: list[int] = found.tolist()
        return types

    def _flag(self, name: str, default: bool) -> bool:
        found = self._value(name)
        if found is None:
            return default
        if type(found) is not bool:
            self._refuse(f"has {found!a:.40} for tokenizer.ggml.{name}, expected a truth value.")
        return found

    def _named_id(self, key: str) -> int | None:
        found = self._value(key)
        if found is None and self._sentencepiece:
            found = _SENTENCEPIECE_IDS.get(key)
        if found is None:
            return None
        if type(found) is not int or not 0 <= found < len(self._tokens):
            last = len(self._tokens) - 1
            self._refuse(f"has {found!a:.40} for tokenizer.ggml.{key}, expected 0 to {last}.")
        return found

    def _ends(self) -> list[int]:
        """Ids that end a text; first the one that the metadata calls so."""
        named = [self._named_id(f"{name}_token_id") for name in ("eos", "eot", "eom")]
        spelled = [
            number
            for number, (token, kind) in enumerate(zip(self._tokens, self._types, strict=True))
            if (kind == TokenType.CONTROL and token in _ENDS)
            or (kind == TokenType.USER_DEFINED and token == _VISIBLE_END)
        ]
        return list(dict.fromkeys(each for each in (*named, *spelled) if each is not None))

    def _sampling(self) -> dict[str, Any]:
        """What the model's makers recommend for drawing tokens."""
        found = {
            ours: self._metadata[f"general.sampling.{name}"]
            for name, ours in _SAMPLING.items()
            if f"general.sampling.{name}" in self._metadata
        }
        return {"do_sample": True, **found} if found else {}

    def _templates(self) -> tuple[str | None, dict[str, str]]:
        """The chat template, and those with names of their own."""
        prefix = "tokenizer.chat_template"
        texts = {
            key.removeprefix(prefix).removeprefix("."): text
            for key, text in self._metadata.items()
            if (key == prefix or key.startswith(prefix + ".")) and isinstance(text, str)
        }
        return texts.pop("", None), texts

    def _tokenizer(self) -> dict[str, Any]:
        spelled = self._spelled()
        vocabulary = {
            token: number
            for number, (token, kind) in enumerate(zip(spelled, self._types, strict=True))
            if kind != TokenType.UNUSED
        }
        parts = self._pieces(vocabulary) if self._words is None else self._bytes(vocabulary)
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": self._added(spelled),
            "post_processor": self._around(),
            **parts,
        }

    def _spelled(self) -> Sequence[str]:
        """The tokens as the vocabulary of transformers has them.

        llama.cpp's converter writes a token of nothing but spaces as such, where it was added to
        SentencePiece's; its merges need it as marks.
        """
        if not self._sentencepiece:
            return self._tokens
        return [
            _SPACE * len(token) if token and not token.strip(" ") else token
            for token in self._tokens
        ]

    def _added(self, spelled: Sequence[str]) -> list[dict[str, Any]]:
        special = (TokenType.CONTROL, TokenType.UNKNOWN)
        return [
            {
                "id": number,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind in special,
            }
            for number, (token, kind) in enumerate(zip(spelled, self._types, strict=True))
            if kind in (*special, TokenType.USER_DEFINED) and token
        ]

    def _around(self) -> dict[str, Any] | None:
        """What is put around a text: its beginning, its end."""
        begins = self._sentencepiece or (self._words is not None and self._words.begins)
        # Early files of Gemma 4 say false, and the model fails without; llama.cpp does not ask.
        begins = self._flag("add_bos_token", begins) or self._model == "gemma4"
        first = self._marker("bos", begins)
        last = self._marker("eos", self._flag("add_eos_token", False))
        if first is None and last is None:
            return None
        texts = [
            [*_piece(first, kind), {"Sequence": {"id": name, "type_id": kind}}, *_piece(last, kind)]
            for kind, name in enumerate("AB")
        ]
        return {
            "type": "TemplateProcessing",
            "single": texts[0],
            "pair": texts[0] + texts[1],
            "special_tokens": {
                token: {"id": token, "ids": [self._ids[token]], "tokens": [token]}
                for token in dict.fromkeys((first, last))
                if token is not None
            },
        }

    def _marker(self, name: str, wanted: bool) -> str | None:
        if not wanted:
            return None
        number = self._named_id(f"{name}_token_id")
        if number is None:
            self._refuse(f"wants tokenizer.ggml.{name}_token_id around a text, and has none.")
        return self._tokens[number]

    def _bytes(self, vocabulary: Mapping[str, int]) -> dict[str, Any]:
        """The parts of a tokenizer that spells bytes as letters, and merges them by rank."""
        words = self._words or _UNKNOWN
        cuts = [
            {"type": "Split", "pattern": {"Regex": each}, "behavior": "Isolated", "invert": False}
            for each in words.patterns
        ]
        return {
            "normalizer": {"type": "NFC"} if words.composed else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*cuts, _byte_level()]},
            "decoder": _byte_level(),
            "model": _bpe(
                vocabulary, self._stored_merges(vocabulary), ignore_merges=words.whole_words
            ),
        }

    def _stored_merges(self, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
        """The pairs of tokens that are merged, by rank, as the file has them."""
        merges = [_halves(merge) for merge in self._strings("merges")]
        for left, right in merges:
            if not {left, right, left + right} <= vocabulary.keys():
                self._refuse(f"merges {left!a:.40} and {right!a:.40}, which are no tokens.")
        return merges

    def _pieces(self, vocabulary: Mapping[str, int]) -> dict[str, Any]:
        """The parts of a SentencePiece tokenizer with merges, as transformers has them."""
        prefixed = self._flag("add_space_prefix", self._sentencepiece)
        marks: list[dict[str, Any]] = [
            {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
        ]
        spaces: list[dict[str, Any]] = [
            {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ]
        if prefixed:
            marks.insert(0, {"type": "Prepend", "prepend": _SPACE})
            spaces.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        unknown = self._named_id("unknown_token_id")
        return {
            "normalizer": {"type": "Sequence", "normalizers": marks},
            "pre_tokenizer": None,
            "decoder": {"type": "Sequence", "decoders": spaces},
            "model": _bpe(
                vocabulary,
                self._derived(vocabulary)
                if self._sentencepiece
                else self._stored_merges(vocabulary),
                unk_token=None if unknown is None else self._tokens[unknown],
                fuse_unk=True,
                byte_fallback=TokenType.BYTE in self._types,
            ),
        }

    def _derived(self, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
        ranks = self._ranks(vocabulary)
        return _derived_merges(vocabulary, ranks, longest_first=self._of_gemma)

    def _ranks(self, vocabulary: Mapping[str, int]) -> Mapping[str, float]:
        """What a merge is put in order by: the greater, the earlier.

        llama.cpp's converter gives added tokens scores of its own. Gemma merges into those first
        (long runs of spaces and lines), then in the order of its ids.
        """
        if self._of_gemma:
            added = (TokenType.USER_DEFINED, TokenType.CONTROL)
            return {
                token: 1.0 if self._types[number] in added else -float(number)
                for token, number in vocabulary.items()
            }
        scores = self._value("scores")
        if not isinstance(scores, np.ndarray) or len(scores) != len(self._tokens):
            self._refuse("has no tokenizer.ggml.scores, one for each token.")
        if not np.isfinite(scores).all():
            self._refuse("has tokenizer.ggml.scores that are no numbers.")
        return {token: float(scores[number]) for token, number in vocabulary.items()}


def _halves(merge: str) -> tuple[str, str]:
    """The two tokens of a merge; a token may begin with a space, and has none else."""
    left, _, right = merge[1:].partition(" ")
    return merge[:1] + left, right


def _derived_merges(
    vocabulary: Mapping[str, int], ranks: Mapping[str, float], *, longest_first: bool
) -> list[tuple[str, str]]:
    """The pairs of tokens that make a token, as transformers derives them from SentencePiece's.

    Those of one rank are in the order of their ids, as transformers had it when the tokenizers of
    Llama 2 and Mistral were made; by the time of Gemma 3 the longest left half came first.
    """
    found = []
    for token, rank in ranks.items():
        pairs = [
            (vocabulary[left], vocabulary[right], left, right, rank)
            for cut in range(1, len(token))
            if (left := token[:cut]) in vocabulary and (right := token[cut:]) in vocabulary
        ]
        found += sorted(pairs)
    if longest_first:
        found.sort(key=lambda pair: (len(pair[2]), len(pair[3])), reverse=True)
    found.sort(key=lambda pair: pair[4], reverse=True)
    return [(left, right) for _, _, left, right, _ in found]


def _bpe(
    vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], **fields: Any
) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        **fields,
        "vocab": vocabulary,
        "merges": merges,
    }


def _byte_level() -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }


def _piece(token: str | None, kind: int) -> list[dict[str, Any]]:
    return [] if token is None else [{"SpecialToken": {"id": token, "type_id": kind}}]


def _json_bytes(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
