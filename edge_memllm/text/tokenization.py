"""Text to token ids and back, from the tokenizer files of an artifact.

Decoding also works token by token, without ever giving out half a character. Knows nothing of
graphs, tables or sampling.

A stop string ends a text wherever its pieces are cut: what could be its beginning is held back
until it is clear.
"""

from __future__ import annotations

import re
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterable, Sequence
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, Protocol

from edge_memllm.artifact.strict_json import parse_json_object
from edge_memllm.errors import ArtifactError, RequestError
from edge_memllm.text import (
    CONFIG_FILE,
    TEMPLATE_FILE,
    TOKENIZER_FILE,
    TOKENS_FILE,
    VOCABULARY_FILE,
)
from edge_memllm.text.byte_pairs import BytePairTokenizer
from edge_memllm.text.chat import ChatTemplate
from edge_memllm.text.library_tokenizer import LibraryTokenizer
from edge_memllm.text.token_bound import TokenBound
from edge_memllm.text.tokenizer_file import TokenizerConfig, is_unicode
from edge_memllm.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    from edge_memllm.artifact.folder import Artifact


MAX_CONFIG_BYTES = 16 << 20  # thousands of added tokens take about a million bytes
_UNFINISHED = "\ufffd"  # what bytes are decoded to that are no character, or not yet
_MOST_BYTES = 3  # of a character that is not complete
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")

MAX_STOPS = 64
MAX_STOP_CHARACTERS = 4096


class Reader(Protocol):
    """What encodes and decodes: the library, or a vocabulary file. Several threads share it."""

    @property
    def reader(self) -> str:
        """A word for people: "tokenizers" or "vocabulary file"."""

    @property
    def special(self) -> frozenset[int]:
        """The ids that have no text."""

    @property
    def decoders(self) -> tuple[str, ...]:
        """The parts of the decoder, as a tokenizer.json names them."""

    @property
    def definition(self) -> str:
        """The text of a `tokenizer.json` that makes the same tokenizer."""

    @property
    def bound(self) -> TokenBound:
        """How few tokens a text can have."""

    def encode(self, text: str, special: bool) -> list[int]:
        """Return the ids of a text; `special` puts what belongs around it."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids: without those that are special or none."""

    def spelling(self, token: int) -> str | None:
        """Return how an entry is spelt; None for an id that is none."""

    def token(self, spelling: str) -> int | None:
        """Return the id of the entry that is spelt so; None where there is none."""


class Tokenizer:
    """The tokenizer of one artifact; stateless, so several threads may share it."""

    def __init__(
        self,
        definition: bytes | bytearray | Reader,
        *,
        config: TokenizerConfig | None = None,
        template: ChatTemplate | None = None,
    ) -> None:
        """Take the bytes of a `tokenizer.json`, and what else is said of it.

        In place of the bytes, what reads them already. Raises `ArtifactError` for what is no
        tokenizer.
        """
        if isinstance(definition, bytes | bytearray):
            definition = LibraryTokenizer(bytes(definition), config)
        self._reader = definition
        self.named_tokens = {} if config is None else config.named
        self._template = template
        self._spelling, self.mixes_bytes = _bytes_in(self._reader.decoders)
        self._bytes: dict[int, bytes | None] = {}  # of entries that were asked for

    @classmethod
    def from_artifact(cls, artifact: Artifact) -> Tokenizer:
        """Read `tokenizer.json`, what is said of its tokens and, if there is one, the template.

        With a vocabulary file, `tokenizer.json` is left alone. A template that is none ends chat
        only: it is found out when it is used. Raises `ArtifactError`.
        """
        files = artifact.manifest.files

        def read(name: str) -> bytes | None:
            return artifact.read_bytes(name) if name in files else None

        where = str(artifact.path)
        if VOCABULARY_FILE not in files or TOKENIZER_FILE not in files:
            return cls.from_files(read, where)
        config, template = _said_of(read, where)
        vocabulary = Vocabulary.from_artifact(artifact)

        def definition() -> str:
            return LibraryTokenizer(artifact.read_bytes(TOKENIZER_FILE), config).definition

        return cls(BytePairTokenizer(vocabulary, definition), config=config, template=template)

    @classmethod
    def from_files(cls, read: Callable[[str], bytes | None], where: str) -> Tokenizer:
        """Take the files of a folder called `where`: `read` gives None for one that is not there.

        Raises `ArtifactError`.
        """
        definition = read(TOKENIZER_FILE)
        if definition is None:
            raise ArtifactError(
                f"{where}: no tokenizer.json in the manifest, so text cannot be read. "
                "Export again from a checkpoint folder that has a tokenizer."
            )
        config, template = _said_of(read, where)
        return cls(definition, config=config, template=template)

    @property
    def reader(self) -> str:
        """What reads the vocabulary: "tokenizers", the library, or "vocabulary file"."""
        return self._reader.reader

    @property
    def definition(self) -> str:
        """The text of a `tokenizer.json` that makes the same tokenizer."""
        return self._reader.definition

    @property
    def bound(self) -> TokenBound:
        """How few tokens a text can have, told from its length."""
        return self._reader.bound

    @cached_property
    def beginning(self) -> list[int]:
        """The ids that are put before every text, such as that of bos_token; often none."""
        whole, plain = self.encode("a"), self.encode("a", special=False)
        starts = range(len(whole) - len(plain) + 1)
        found = next((k for k in starts if whole[k : k + len(plain)] == plain), 0)
        return whole[:found]

    @property
    def chat_template(self) -> ChatTemplate | None:
        """What turns chat messages into a prompt; None when the artifact has no template."""
        return self._template

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the ids of `text`; `special` adds what the tokenizer puts around a text.

        Text made by a chat template holds its special tokens already: pass `special=False`.
        However long the text is, other threads go on meanwhile. Raises `RequestError` for what is
        not text, `ArtifactError` where the tokenizer fails.
        """
        if not isinstance(text, str) or not is_unicode(text):
            raise RequestError(
                f"{text!a:.80} is not text: expected a str that can be written as UTF-8."
            )
        return self._reader.encode(text, special)

    def spelling(self, token: int) -> str | None:
        """Return a token as the vocabulary spells it; None for an id that has no token."""
        return self._reader.spelling(token)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids` without special tokens.

        Bytes that are no character become U+FFFD, those around them stay what they are.
        """
        text = self.decode_at_once(ids)
        if self.mixes_bytes and _UNFINISHED in text:
            detokenizer = Detokenizer(self)
            text = "".join(map(detokenizer.push, ids)) + detokenizer.flush()
        return text

    def decode_at_once(self, ids: Sequence[int]) -> str:
        """Return the text of `ids` as the library decodes them.

        Where only some tokens stand for bytes, it gives up all bytes in a row when they are not
        all characters.
        """
        return self._reader.decode(ids)

    def special_token(self, text: str) -> int | None:
        """Return the special token that is spelt so; None where there is none."""
        token = self.token(text)
        return token if token in self._reader.special else None

    def token(self, spelling: str) -> int | None:
        """Return the token that the vocabulary spells so; None where there is none."""
        return self._reader.token(spelling)

    def is_silent(self, token: int) -> bool:
        """Whether a token has no text, wherever it stands: a special one, or none at all."""
        return token in self._reader.special or (
            token not in self._bytes and self.spelling(token) is None
        )

    def bytes_of(self, token: int) -> bytes | None:
        """Return the bytes that a token stands for; None where its neighbours have a say."""
        if token not in self._bytes:
            spelling = self.spelling(token)
            if spelling is None:
                return self._spelling("")
            self._bytes[token] = self._spelling(spelling)
        return self._bytes[token]


class Detokenizer:
    """Turns ids into text one by one: the pieces joined are the decoded whole.

    A piece ends at a character boundary, so it may be empty until the tokens that complete a
    character have come. At most three bytes wait; what cannot become a character does not.
    `shown` are special tokens that stand in the text as they are spelt.
    """

    def __init__(self, tokenizer: Tokenizer, shown: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._spelt = {token: tokenizer.spelling(token) or "" for token in shown}
        self._utf8 = getincrementaldecoder("utf-8")("replace")
        self._waiting: list[int] = []  # tokens whose bytes wait
        # Decoders look at their neighbours (leading spaces), so text is decoded behind the tokens
        # of the piece before. The last `_pending` tokens of that window wait, and the first
        # `_shown` characters of its text are out.
        self._window: list[int] = []
        self._pending = 0
        self._shown = 0

    def push(self, token: int) -> str:
        """Take the next id and return the text that is now certain."""
        if token in self._spelt:
            return self._end_bytes() + self._end_text() + self._spelt[token]
        if self._tokenizer.is_silent(token):
            return ""
        spelt = self._tokenizer.bytes_of(token)
        if spelt is None:
            return self._end_bytes() + self._push_text(token)
        text = self._utf8.decode(spelt)
        return self._end_text() + self._settle(token, text)

    def flush(self) -> str:
        """Return what was held back: the tokens have ended, complete or not."""
        return self._end_bytes() + self._end_text()

    def _settle(self, token: int, text: str) -> str:
        """Return the text of bytes; remember their tokens where other text may follow."""
        if not self._tokenizer.mixes_bytes:
            return text
        self._waiting.append(token)  # one byte each
        if not text:
            return ""
        known = len(self._waiting) - len(self._utf8.getstate()[0])
        unit, self._waiting = self._waiting[:known], self._waiting[known:]
        if not self._window and _UNFINISHED not in text:
            text = self._tokenizer.decode_at_once(unit)  # a space may fall away at the beginning
        self._window = unit
        return text

    def _end_bytes(self) -> str:
        """Give up waiting for bytes: something else follows, or nothing."""
        text = self._utf8.decode(b"", final=True)
        if self._waiting:
            self._window, self._waiting = self._waiting, []
        return text

    def _end_text(self) -> str:
        """Give up waiting for text."""
        if not self._pending:
            return ""
        self._pending = 0
        return self._tokenizer.decode_at_once(self._window)[self._shown :]

    def _push_text(self, token: int) -> str:
        decode = self._tokenizer.decode_at_once
        if not self._pending:
            self._shown = len(decode(self._window))
        self._window = [*self._window, token]
        self._pending += 1
        text = decode(self._window)
        # Only a decoder that mixes bytes into text in a way of its own leaves them incomplete.
        waits = text.endswith(_UNFINISHED) and self._pending <= _MOST_BYTES
        certain = len(text) - waits
        piece = text[self._shown : certain]
        if waits:
            self._shown = max(self._shown, certain)
        else:
            self._window, self._pending = self._window[-self._pending :], 0
        return piece


def _said_of(
    read: Callable[[str], bytes | None], where: str
) -> tuple[TokenizerConfig, ChatTemplate | None]:
    """Read what is said of a tokenizer's tokens, and the template if there is one."""
    fields, tokens = (
        parse_json_object(read(name) or b"{}", f"{where}/{name}", MAX_CONFIG_BYTES)
        for name in (CONFIG_FILE, TOKENS_FILE)
    )
    config, source = TokenizerConfig(fields, tokens), fields.get("chat_template")
    if (text := read(TEMPLATE_FILE)) is not None:
        source = text
    return config, None if source is None else ChatTemplate(source, config.named)


def _bytes_in(decoders: Sequence[str]) -> tuple[Callable[[str], bytes | None], bool]:
    """Return how to tell a token's bytes from its spelling, and whether there is other text too."""
    if list(decoders) == ["ByteLevel"]:
        return _byte_level, False
    if "ByteFallback" in decoders:
        return _byte_fallback, True
    return lambda spelling: None, False


def _byte_level(spelling: str) -> bytes:
    letters = _byte_letters()
    found = [letters.get(letter) for letter in spelling]
    return spelling.encode() if None in found else bytes(found)  # type: ignore[arg-type]


def _byte_fallback(spelling: str) -> bytes | None:
    match = _BYTE.fullmatch(spelling)
    return None if match is None else bytes([int(match[1], 16)])


@cache
def _byte_letters() -> dict[str, int]:
    """The byte that each letter stands for, where every token is bytes."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {
        chr(256 + place): byte for place, byte in enumerate(unseen)
    }


def read_json(artifact: Artifact, name: str) -> dict[str, Any]:
    """Return a JSON object of the artifact, or an empty one when the artifact lacks the file."""
    if name not in artifact.manifest.files:
        return {}
    return parse_json_object(artifact.read_bytes(name), str(artifact.path / name), MAX_CONFIG_BYTES)


def check_stops(stop: str | Sequence[str]) -> tuple[str, ...]:
    """Return the stop strings as a tuple; one string stands for itself.

    Raises `RequestError` for an empty string, too many or too long ones, or anything else.
    """
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > MAX_STOPS:
        raise RequestError(f"{len(stops)} stop strings were given, expected at most {MAX_STOPS}.")
    for text in stops:
        if not isinstance(text, str):
            raise RequestError(f"stop holds {text!r}, expected strings only.")
        if not 1 <= len(text) <= MAX_STOP_CHARACTERS:
            raise RequestError(
                f"a stop string has {len(text)} characters, expected 1 to {MAX_STOP_CHARACTERS}."
            )
    return stops


class StopMatcher:
    """Lets text through up to the first stop string that is complete.

    When two are complete at the same character, the longer one counts. So the result depends on
    the text alone, not on how it was cut into pieces. Takes linear time.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._automata = [_PrefixAutomaton(text) for text in stops]
        self._held = ""
        self.found: str | None = None  # the stop string that is complete

    @property
    def stopped(self) -> bool:
        """Whether a stop string is complete."""
        return self.found is not None

    def push(self, text: str) -> str:
        """Take the next piece and return what can be shown now; nothing after a stop."""
        if not self._automata:
            return text
        if self.stopped:
            return ""
        self._held += text
        start = len(self._held) - len(text)
        for end in range(start + 1, len(self._held) + 1):
            matched = self._advance(self._held[end - 1])
            if matched:
                self.found = self._held[end - matched : end]
                return self._release(end - matched)
        open_prefix = max((automaton.matched for automaton in self._automata), default=0)
        return self._release(len(self._held) - open_prefix)

    def flush(self) -> str:
        """Return what is held back: the text has ended without a stop string."""
        return "" if self.stopped else self._release(len(self._held))

    def _advance(self, letter: str) -> int:
        """Feed one character to all; return the length of the longest complete stop string."""
        complete = 0
        for automaton in self._automata:
            if automaton.advance(letter):
                complete = max(complete, automaton.matched)
        return complete

    def _release(self, count: int) -> str:
        shown, self._held = self._held[:count], self._held[count:]
        return shown


class _PrefixAutomaton:
    """Counts with how many characters of one string the text so far ends (Knuth-Morris-Pratt)."""

    def __init__(self, text: str) -> None:
        self.matched = 0
        self._text = text
        self._fallback = [0] * len(text)
        for end in range(1, len(text)):
            self._fallback[end] = self._extend(self._fallback[end - 1], text[end])

    def advance(self, letter: str) -> bool:
        """Take one character; True when the whole string has just been seen."""
        self.matched = self._extend(self.matched, letter)
        return self.matched == len(self._text)

    def _extend(self, matched: int, letter: str) -> int:
        while matched and self._text[matched] != letter:
            matched = self._fallback[matched - 1]
        return matched + (self._text[matched] == letter)
