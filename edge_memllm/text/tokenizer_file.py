"""The one place that opens a tokenizer.json and that the `tokenizers` library is called through.

Such a file may say that texts are cut, padded or split at random; that serves training with other
tools, and here would change a prompt without a word. So a tokenizer always comes without. The
library fails with bare exceptions and, where its own code panics, with a BaseException; here both
become `ArtifactError`.

Before it is built, a file is looked through: the library builds and runs what it says without
bounds. A text may swell in the normaliser, be doubled by the post-processor, or be split by a
pattern that takes for ever. Only parts are let through that are known, in numbers of real
tokenizers. Tokens that tokenizer_config.json and special_tokens_map.json name are added as
transformers adds them; chat templates may use their names.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import tokenizers
from tokenizers import AddedToken, Tokenizer

from edge_memllm.artifact.strict_json import parse_json_object
from edge_memllm.errors import ArtifactError
from edge_memllm.text import CONFIG_FILE, TOKENIZER_FILE
from edge_memllm.text.patterns import PatternError, check_pattern

# Of everything in the largest real tokenizers, two to four times as much.
MOST_TOKENS = 1 << 20
MOST_MERGES = 1 << 20
MOST_ADDED = 1 << 18
MOST_ADDED_LETTERS = 1 << 22
MOST_PARTS = 64  # of a normalizer, a pre-tokenizer, a post-processor or a decoder
MOST_NESTED = 8
MOST_WORD = 200  # characters that WordPiece takes for one word: it tries all parts of them
MOST_SWELLING = 16  # bytes that one byte of a text becomes, at most
MOST_CHARSMAP = 4 << 20
MOST_MAPPED = 64  # bytes that one character is mapped to
MOST_LETTERS = 1024  # of a token: each of a text holds its own
MOST_AFFIX = 16  # characters of what marks parts of words, put to each of them
MOST_AROUND = 64  # tokens put around a text

_NORMALIZERS = {
    *("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "Nmt", "Precompiled"),
    *("BertNormalizer", "Prepend", "Replace", "ByteLevel", "Sequence"),
}
_PRE_TOKENIZERS = {
    *("BertPreTokenizer", "ByteLevel", "CharDelimiterSplit", "Metaspace", "Whitespace", "Split"),
    *("WhitespaceSplit", "Punctuation", "Digits", "UnicodeScripts", "FixedLength", "Sequence"),
}
_POST_PROCESSORS = {
    *("TemplateProcessing", "BertProcessing", "RobertaProcessing", "ByteLevel", "Sequence"),
}
_DECODERS = {
    *("BPEDecoder", "ByteLevel", "WordPiece", "Metaspace", "CTC", "Replace", "Fuse", "Strip"),
    *("ByteFallback", "Sequence"),
}
_MODELS = ("BPE", "WordPiece", "WordLevel", "Unigram")
_SECTIONS = {
    "normalizer": ("normalizers", _NORMALIZERS),
    "pre_tokenizer": ("pretokenizers", _PRE_TOKENIZERS),
    "post_processor": ("processors", _POST_PROCESSORS),
    "decoder": ("decoders", _DECODERS),
}

# The largest known vocabularies, of 262,144 tokens, take 35 million bytes.
MAX_TOKENIZER_BYTES = 64 << 20

# In the order in which they get ids, where the vocabulary lacks them.
_NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_EXTRA, _OLD_EXTRA = "extra_special_tokens", "additional_special_tokens"
_ADDED = "added_tokens_decoder"


def check_tokenizer(fields: Mapping[str, Any], where: str) -> None:
    """Raise `ArtifactError` for a tokenizer that might hang or swell; `fields` is its object."""
    _Check(where).all(fields)


class _Check:
    def __init__(self, where: str) -> None:
        self._where = where
        self._swelling = 1

    def all(self, fields: Mapping[str, Any]) -> None:
        added = self._count("added_tokens", fields.get("added_tokens"), MOST_ADDED)
        contents = [str(each.get("content")) for each in added if isinstance(each, dict)]
        self._lengths("added_tokens", contents)
        letters = sum(map(len, contents))
        if letters > MOST_ADDED_LETTERS:
            self._refuse(
                f"added_tokens have {letters} characters, expected at most {MOST_ADDED_LETTERS}."
            )
        self._model(fields.get("model"))
        for section, (inner, known) in _SECTIONS.items():
            self._swelling = 1 if section == "decoder" else self._swelling
            self._section(section, fields.get(section), inner, known)

    def _section(self, section: str, value: Any, inner: str, known: set[str]) -> None:
        parts = list(self._parts(section, value, inner, 0))
        if len(parts) > MOST_PARTS:
            self._refuse(f"{section} has {len(parts)} parts, expected at most {MOST_PARTS}.")
        for part in parts:
            kind = part.get("type")
            if not isinstance(kind, str) or kind not in known:
                self._refuse(
                    f"{section} has a part of type {kind!a:.60}, expected one of "
                    f"{', '.join(sorted(known))}."
                )
            check = _CHECKS.get((section, kind)) or _CHECKS.get(("", kind))
            if check is not None:
                check(self, section, part)
        if self._swelling > MOST_SWELLING:
            self._refuse(
                f"{section}: a text may become {self._swelling} times as long, expected at most "
                f"{MOST_SWELLING} times."
            )

    def _parts(self, section: str, value: Any, inner: str, depth: int) -> Iterator[dict[str, Any]]:
        """The parts of a section, those of sequences one by one."""
        if value is None:
            return
        if depth > MOST_NESTED:
            self._refuse(f"{section} is nested too deeply, expected at most {MOST_NESTED} times.")
        if not isinstance(value, dict):
            self._refuse(f"{section} holds a {type(value).__name__}, expected an object.")
        if value.get("type") != "Sequence":
            yield value
            return
        for each in self._count(section, value.get(inner), MOST_PARTS):
            yield from self._parts(section, each, inner, depth + 1)

    def _model(self, model: Any) -> None:
        if not isinstance(model, dict):
            return  # which the library refuses
        kind = model.get("type", _kind_of(model))
        if kind not in _MODELS:
            self._refuse(f"model is of type {kind!a:.60}, expected one of {', '.join(_MODELS)}.")
        tokens = self._count("model's vocab", model.get("vocab"), MOST_TOKENS)
        if kind == "Unigram":
            tokens = [each[0] for each in tokens if isinstance(each, list) and each]
        self._lengths("model's vocab", [*map(str, tokens), str(model.get("unk_token"))])
        merges = self._count("model's merges", model.get("merges"), MOST_MERGES)
        for name in ("continuing_subword_prefix", "end_of_word_suffix"):
            if len(str(model.get(name) or "")) > MOST_AFFIX:
                self._refuse(f"model's {name} has more than {MOST_AFFIX} characters.")
        if kind == "BPE" and (prefix := model.get("continuing_subword_prefix")):
            self._continuing(merges, str(prefix))
        longest = model.get("max_input_chars_per_word")
        if kind == "WordPiece" and isinstance(longest, int) and longest > MOST_WORD:
            self._refuse(
                f"model takes words of {longest} characters, expected at most {MOST_WORD}."
            )

    def _continuing(self, merges: Iterable[Any], prefix: str) -> None:
        # The library cuts off as many bytes unseen; amid a letter that ends the whole process.
        for merge in merges:
            parts = merge.split(" ") if isinstance(merge, str) else merge
            if isinstance(parts, list) and parts and not str(parts[-1]).startswith(prefix):
                self._refuse(
                    f"model's merges have {str(parts[-1])!a:.60}, which does not start with the "
                    f"continuing_subword_prefix {prefix!a}."
                )

    def _count(self, what: str, value: Any, most: int) -> Any:
        """Return a list or an object of at most `most` values; none at all for null."""
        if value is None:
            return []
        if not isinstance(value, list | dict):
            self._refuse(f"{what} is a {type(value).__name__}, expected a list or an object.")
        if len(value) > most:
            self._refuse(f"{what} has {len(value)} entries, expected at most {most}.")
        return value

    def _lengths(self, what: str, tokens: list[str]) -> None:
        longest = max(map(len, tokens), default=0)
        if longest > MOST_LETTERS:
            self._refuse(
                f"{what} has a token of {longest} characters, expected at most {MOST_LETTERS}."
            )

    def _replace(self, section: str, part: Mapping[str, Any]) -> None:
        shortest = self._pattern(section, part)
        content = part.get("content")
        if isinstance(content, str):
            size = len(content.encode("utf-8", "replace"))
            self._swelling *= size + 1 if shortest == 0 else max(1, -(-size // shortest))

    def _split(self, section: str, part: Mapping[str, Any]) -> None:
        self._pattern(section, part)

    def _pattern(self, section: str, part: Mapping[str, Any]) -> int:
        """Check a pattern; return how many bytes it matches at least."""
        pattern = part.get("pattern")
        if not isinstance(pattern, dict):
            return 0  # which the library refuses
        if isinstance(text := pattern.get("String"), str):
            return len(text.encode("utf-8", "replace"))
        if not isinstance(expression := pattern.get("Regex"), str):
            return 0
        try:
            return check_pattern(expression)
        except PatternError as error:
            self._refuse(f"{section}: the pattern {expression!a:.100} {error}")

    def _double(self, section: str, part: Mapping[str, Any]) -> None:
        self._swelling *= 2

    def _prepend(self, section: str, part: Mapping[str, Any]) -> None:
        if len(str(part.get("prepend", ""))) > MOST_SWELLING:
            self._refuse(f"{section} prepends more than {MOST_SWELLING} characters.")

    def _precompiled(self, section: str, part: Mapping[str, Any]) -> None:
        try:
            data = base64.b64decode(part.get("precompiled_charsmap") or "", validate=True)
        except (binascii.Error, TypeError, ValueError):
            self._refuse(f"{section}: the map of characters is not Base64.")
        size = int.from_bytes(data[:4], "little")
        if not 4 <= len(data) <= MOST_CHARSMAP or size % 4 or 4 + size > len(data):
            self._refuse(
                f"{section}: the map of characters has {len(data)} bytes, which say that {size} of "
                f"them are a tree; expected at most {MOST_CHARSMAP}."
            )
        longest = max(map(len, data[4 + size :].split(b"\0")))
        if longest > MOST_MAPPED:
            self._refuse(
                f"{section}: a character is mapped to {longest} bytes, expected at most "
                f"{MOST_MAPPED}."
            )

    def _template(self, section: str, part: Mapping[str, Any]) -> None:
        for name in ("single", "pair"):
            pieces = self._count(f"{section}'s {name}", part.get(name), MOST_AROUND)
            texts = [each for each in pieces if isinstance(each, dict) and "Sequence" in each]
            if name == "single" and len(texts) != 1:
                self._refuse(f"{section} holds a text {len(texts)} times, expected once.")
        tokens = self._count(f"{section}'s special_tokens", part.get("special_tokens"), MOST_AROUND)
        for each in tokens.values() if isinstance(tokens, dict) else tokens:
            if isinstance(each, dict):
                self._count(f"a special token of {section}", each.get("ids"), MOST_AROUND)

    def _refuse(self, what: str) -> NoReturn:
        raise ArtifactError(
            f"{self._where}: {what} No tokenizer known to us is like that; get the model's own."
        )


_CHECKS: dict[tuple[str, str], Callable[[_Check, str, Mapping[str, Any]], None]] = {
    ("", "Replace"): _Check._replace,
    ("", "Split"): _Check._split,
    ("", "Prepend"): _Check._prepend,
    ("", "Precompiled"): _Check._precompiled,
    ("", "TemplateProcessing"): _Check._template,
    # They write each byte beyond ASCII as a letter of two.
    ("normalizer", "ByteLevel"): _Check._double,
    ("pre_tokenizer", "ByteLevel"): _Check._double,
}


def _kind_of(model: Mapping[str, Any]) -> str:
    """The type of a model that older files do not name."""
    if "merges" in model:
        return "BPE"
    if isinstance(model.get("vocab"), list):
        return "Unigram"
    return "WordPiece" if "max_input_chars_per_word" in model else "WordLevel"


def open_tokenizer(definition: bytes, where: str = TOKENIZER_FILE) -> tokenizers.Tokenizer:
    """Return the tokenizer of the bytes of a tokenizer.json, as it encodes whole texts for sure.

    Raises `ArtifactError`, which names `where`.
    """
    check_tokenizer(parse_json_object(definition, where, MAX_TOKENIZER_BYTES), where)
    with library_errors(f"{where}: not a tokenizer that tokenizers {tokenizers.__version__} reads"):
        tokenizer = tokenizers.Tokenizer.from_str(definition.decode("utf-8"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if getattr(tokenizer.model, "dropout", None) is not None:
            tokenizer.model.dropout = None
    return tokenizer


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Raise `ArtifactError`, which begins with `what`, where the library fails."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and not _is_panic(error):
            raise
        raise ArtifactError(
            f"{what} ({error}). Copy the file again, or export again from the model's own."
        ) from error


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: it has no half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _is_panic(error: BaseException) -> bool:
    """Whether Rust code gave up; the class cannot be imported."""
    return type(error).__module__ == "pyo3_runtime"


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
