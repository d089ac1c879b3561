"""Text to token ids and back, from the tokenizer files of an artifact.

Decoding also works token by token, without ever giving out half a character. Knows the
`tokenizers` library; nothing of graphs, tables or sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edge_memllm.chat import TEMPLATE_FILE, ChatTemplate
from edge_memllm.errors import ArtifactError, RequestError
from edge_memllm.strict_json import parse_json_object
from edge_memllm.tokenizer_config import CONFIG_FILE, TOKENS_FILE, TokenizerConfig
from edge_memllm.tokenizer_file import TOKENIZER_FILE, is_unicode, library_errors, open_tokenizer

if TYPE_CHECKING:
    from edge_memllm.artifact import Artifact

_UNFINISHED = "\ufffd"  # what bytes decode to while their character is not complete
MAX_CONFIG_BYTES = 16 << 20  # thousands of added tokens take about a million bytes
_BRIEF = 4096  # characters that are encoded in a few milliseconds


class Tokenizer:
    """The tokenizer of one artifact; stateless, so several threads may share it."""

    def __init__(
        self,
        definition: bytes,
        *,
        config: TokenizerConfig | None = None,
        template: ChatTemplate | None = None,
    ) -> None:
        """Take the bytes of a `tokenizer.json`, and what else is said of it.

        Raises `ArtifactError` for what is no tokenizer.
        """
        self._tokenizer = open_tokenizer(definition)
        if config is not None:
            config.apply(self._tokenizer)
        self.named_tokens = {} if config is None else config.named
        self._template = template

    @classmethod
    def from_artifact(cls, artifact: Artifact) -> Tokenizer:
        """Read `tokenizer.json`, what is said of its tokens and, if there is one, the template.

        A template that is none ends chat only: it is found out when it is used.
        """
        files = artifact.manifest.files
        if TOKENIZER_FILE not in files:
            raise ArtifactError(
                f"{artifact.path}: no tokenizer.json in the manifest, so text cannot be read. "
                "Export again from a checkpoint folder that has a tokenizer."
            )
        fields = read_json(artifact, CONFIG_FILE)
        config = TokenizerConfig(fields, read_json(artifact, TOKENS_FILE))
        source = fields.get("chat_template")
        if TEMPLATE_FILE in files:
            source = artifact.read_bytes(TEMPLATE_FILE)
        template = None if source is None else ChatTemplate(source, config.named)
        return cls(artifact.read_bytes(TOKENIZER_FILE), config=config, template=template)

    @property
    def definition(self) -> str:
        """The text of a `tokenizer.json` that makes the same tokenizer."""
        text: str = self._tokenizer.to_str()
        return text

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
        with library_errors(f"{TOKENIZER_FILE}: fails to encode a text"):
            # The first is quicker to call, but holds the interpreter; the second does not, and
            # leaves out the offsets, which take half of the time. Both give the same ids.
            if len(text) <= _BRIEF:
                encoding = self._tokenizer.encode(text, add_special_tokens=special)
            else:
                (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=special)
        ids: list[int] = encoding.ids
        return ids

    def spelling(self, token: int) -> str | None:
        """Return a token as the vocabulary spells it; None for an id that has no token."""
        found: str | None = self._tokenizer.id_to_token(token)
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids` without special tokens."""
        with library_errors(f"{TOKENIZER_FILE}: fails to decode tokens"):
            text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


class Detokenizer:
    """Turns ids into text one by one: the pieces joined are the decoded whole.

    Exact for byte-level BPE. A piece ends at a character boundary, so it may be empty until the
    tokens that complete a character have come.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Decoders look at their neighbours (leading spaces), so each piece is decoded behind the
        # tokens of the piece before; `_shown` characters of that window are out already.
        self._window: list[int] = []
        self._pending = 0
        self._shown = 0

    def push(self, token: int) -> str:
        """Take the next id and return the text that is now certain."""
        self._window.append(token)
        self._pending += 1
        text = self._tokenizer.decode(self._window)
        certain = len(text.rstrip(_UNFINISHED))
        piece = text[self._shown : certain]
        if piece and certain == len(text):
            self._window = self._window[-self._pending :]
            self._pending = 0
            self._shown = len(self._tokenizer.decode(self._window))
        else:
            self._shown = max(self._shown, certain)
        return piece

    def flush(self) -> str:
        """Return what was held back: the tokens have ended, complete or not."""
        text = self._tokenizer.decode(self._window)
        piece, self._shown = text[self._shown :], len(text)
        return piece


def read_json(artifact: Artifact, name: str) -> dict[str, Any]:
    """Return a JSON object of the artifact, or an empty one when the artifact lacks the file."""
    if name not in artifact.manifest.files:
        return {}
    return parse_json_object(artifact.read_bytes(name), str(artifact.path / name), MAX_CONFIG_BYTES)
