"""A vocabulary as a file of sorted columns: what merging byte pairs looks up, ready to be used.

The `tokenizers` library makes tables of its own of a tokenizer.json when it opens one: seconds, and
memory that stays. Where a tokenizer is of the form that `Rules` can say, an artifact has this file
beside it: read and checked once, searched as it is. The header is the one that its metadata make.
Knows nothing of how texts are cut and merged.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from io import BufferedReader, BytesIO
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_memllm.artifact.strict_json import MAX_JSON_BYTES, exact_fields, parse_json_object
from edge_memllm.artifact.tensor_header import (
    DIGEST,
    LENGTH,
    FileKind,
    Tensors,
    compact,
    data_bytes,
    header_bytes,
    tensor_views,
)
from edge_memllm.errors import ArtifactError, CorruptionError
from edge_memllm.text import CONFIG_FILE, TOKENIZER_FILE, TOKENS_FILE, VOCABULARY_FILE

if TYPE_CHECKING:
    from edge_memllm.artifact.folder import Artifact

KIND = FileKind(
    format="edge-memllm-vocabulary",
    version="1",
    name="vocabulary",
    meaning="a vocabulary file",
    advice="Export the model again.",
    anew="export the model again",
)
MADE_OF = (TOKENIZER_FILE, CONFIG_FILE, TOKENS_FILE)
MOST_ENTRIES = 1 << 21
_UNIT = 64  # bytes that the header is padded to
_LETTER_BITS = 21  # of a code point
_ANY = re.compile(r"(?s).*")
_COUNT = re.compile(r"0|[1-9][0-9]{0,9}")
_U64, _U32, _U8 = np.dtype("<u8"), np.dtype("<u4"), np.dtype("u1")
_COPY_AGAIN = "The file is damaged, or from another export; copy the folder again."


@dataclass(frozen=True, slots=True)
class Rules:
    """What is done to a text besides merging, in the words of a tokenizer.json."""

    replaced: str  # by the normaliser: this letter, " " of most; "" where there is none
    replacement: str
    shown: str  # by the decoder: this text, "\u2581" of most
    shown_as: str
    before: tuple[int, ...]  # ids put before a text
    after: tuple[int, ...]


class Columns(NamedTuple):
    """The columns, in the order of the file: the widest first, so that each is aligned.

    V entries with the ids 0 to V-1.
    """

    pairs: NDArray[np.uint64]  # [m] ascending: left id << 32 | right id of what is merged
    merges: NDArray[np.uint64]  # [m] rank << 32 | id of what it becomes
    joined: NDArray[np.uint64]  # [j] ascending: two letters side by side inside what is merged
    ends: NDArray[np.uint32]  # [V] where each spelling ends
    order: NDArray[np.uint32]  # [V] ids by their spellings' bytes, ascending
    letters: NDArray[np.uint32]  # [l] ascending code points that are entries of their own
    letter_ids: NDArray[np.uint32]  # [l]
    added: NDArray[np.uint32]  # [a] ascending ids that are found in a text before all else
    special: NDArray[np.uint32]  # [s] ascending ids that have no text
    spellings: NDArray[np.uint8]  # [b] in UTF-8, one behind the other

    @property
    def counts(self) -> dict[str, int]:
        """How many values each column has."""
        return {name: len(column) for name, column in self._asdict().items()}


_TYPES: dict[str, np.dtype[Any]] = {
    **dict.fromkeys(("pairs", "merges", "joined"), _U64),
    **dict.fromkeys(("ends", "order", "letters", "letter_ids", "added", "special"), _U32),
    "spellings": _U8,
}


def letter_pairs(codes: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """Return the numbers [n - 1] of the letters that stand side by side in a text of n."""
    wide = codes.astype(np.uint64)
    return wide[:-1] << np.uint64(_LETTER_BITS) | wide[1:]


def columns(
    spellings: list[str],
    merges: Mapping[tuple[int, int], tuple[int, int]],
    added: Iterable[int],
    special: Iterable[int],
) -> Columns:
    """Return the columns of a vocabulary: spellings by id, (rank, id) by the pair that is merged.

    Ids in `added` that are letters stay letters too.
    """
    encoded = [each.encode("utf-8") for each in spellings]
    letters = sorted((ord(each), token) for token, each in enumerate(spellings) if len(each) == 1)
    pairs = sorted(
        (left << 32 | right, rank << 32 | made) for (left, right), (rank, made) in merges.items()
    )
    return Columns(
        pairs=np.array([key for key, _ in pairs], _U64),
        merges=np.array([merge for _, merge in pairs], _U64),
        joined=_joined({spellings[made] for _, made in merges.values()}),
        ends=np.cumsum([len(each) for each in encoded], dtype=_U32),
        order=np.array(sorted(range(len(encoded)), key=encoded.__getitem__), _U32),
        letters=np.array([code for code, _ in letters], _U32),
        letter_ids=np.array([token for _, token in letters], _U32),
        added=np.array(sorted(added), _U32),
        special=np.array(sorted(special), _U32),
        spellings=np.frombuffer(b"".join(encoded), _U8),
    )


def _joined(results: Iterable[str]) -> NDArray[np.uint64]:
    """Return the pairs of letters inside what merging makes."""
    made = [each for each in results if len(each) > 1]
    if not made:
        return np.array([], _U64)
    pairs = letter_pairs(np.frombuffer("".join(made).encode("utf-32-le"), _U32))
    ends = np.cumsum([len(each) for each in made])
    return np.unique(np.delete(pairs, ends[:-1] - 1))  # but those across two of them


@dataclass(frozen=True, slots=True)
class Header:
    """What a header says."""

    rules: Rules
    counts: Mapping[str, int]
    made_of: str  # digest of the digests of the files that this one was made of

    @property
    def tensors(self) -> Tensors:
        """What stands behind the header, in order."""
        return {name: (_TYPES[name], (self.counts[name],)) for name in Columns._fields}

    def to_bytes(self) -> bytes:
        """Return length, JSON, and padding."""
        rules = {each.name: getattr(self.rules, each.name) for each in fields(Rules)}
        metadata = {
            "format": KIND.format,
            "format_version": KIND.version,
            "made_of": self.made_of,
            "rules": compact(rules),
            **{name: str(count) for name, count in self.counts.items()},
        }
        return header_bytes(metadata, self.tensors, _UNIT)

    @classmethod
    def parse(cls, data: bytes, where: str) -> Header:
        """Parse length and JSON. Raises `ArtifactError` for what `to_bytes` would not write."""
        found = KIND.metadata(data, where, ("made_of", "rules", *Columns._fields))
        counts = {
            name: int(found.text(name, _COUNT, "a whole number as text"))
            for name in Columns._fields
        }
        if not 0 < counts["ends"] <= MOST_ENTRIES:
            raise ArtifactError(
                f"{where}: {counts['ends']} entries, expected 1 to {MOST_ENTRIES}. {KIND.advice}"
            )
        rules = _rules(found.text("rules", _ANY, "text"), f"{where}: rules")
        header = cls(rules, counts, found.text("made_of", DIGEST, "64 hex digits"))
        KIND.check_same(data, header.to_bytes(), where)
        return header


def _rules(text: str, where: str) -> Rules:
    names = [each.name for each in fields(Rules)]
    found = exact_fields(parse_json_object(text.encode("utf-8"), where), where, names)
    replaced, replacement, shown, shown_as = (found.text(name, _ANY, "text") for name in names[:4])
    before, after = (found.integers(name, 0, MOST_ENTRIES - 1) for name in names[4:])
    return Rules(replaced, replacement, shown, shown_as, before, after)


def made_of(digests: Mapping[str, str]) -> str:
    """Return what names the files of `MADE_OF` that there are, from their sha256 digests."""
    named = {name: digest for name, digest in digests.items() if name in MADE_OF}
    return hashlib.sha256(compact(named).encode("ascii")).hexdigest()


def vocabulary_bytes(rules: Rules, content: Columns, digests: Mapping[str, str]) -> bytes:
    """Return the file; `digests` are those of the files it is made of."""
    header = Header(rules, content.counts, made_of(digests))
    return header.to_bytes() + b"".join(column.tobytes() for column in content)


class Vocabulary:
    """The columns, every number in them checked. Stateless."""

    def __init__(self, data: bytes | bytearray, where: str, digests: Mapping[str, str]) -> None:
        """Take the bytes of a file; `digests` are those of the files it should be made of.

        Raises `ArtifactError`, and `CorruptionError` for a file of another size.
        """
        view = memoryview(data)
        header = Header.parse(_header(view, where), where)
        start = len(header.to_bytes())
        expected = start + data_bytes(header.tensors)
        if len(view) != expected:
            raise CorruptionError(f"{where}: {len(view)} bytes, expected {expected}. {_COPY_AGAIN}")
        if header.made_of != made_of(digests):
            raise ArtifactError(f"{where}: was not made of the tokenizer beside it. {_COPY_AGAIN}")
        self.where = where
        self.rules = header.rules
        self.columns = Columns(**tensor_views(data, start, header.tensors))
        _check(self.columns, self.rules, where)
        # A look-up takes a number at a time: a memoryview gives one in a fifth of NumPy's time.
        numbers = partial(_numbers, self.columns)
        self._pairs, self._merges = numbers("pairs"), numbers("merges")
        self._letters, self._letter_ids = numbers("letters"), numbers("letter_ids")
        self._ends, self._order = numbers("ends"), numbers("order")
        self._spellings = self.columns.spellings.data

    @classmethod
    def from_artifact(cls, artifact: Artifact) -> Vocabulary:
        """Read the file of an artifact. Raises `ArtifactError` and its kinds, `StorageError`."""
        # Not mapped: a file that is cut short under a map would end the process.
        data = artifact.read_checked(VOCABULARY_FILE)
        digests = {name: spec.sha256 for name, spec in artifact.manifest.files.items()}
        return cls(data, str(artifact.path / VOCABULARY_FILE), digests)

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def longest(self) -> int:
        """How many letters the longest entry has."""
        letters = np.cumsum(self.columns.spellings & 0xC0 != 0x80, dtype=np.uint32)
        ends = self.columns.ends
        before = np.where(ends, letters[ends - 1], 0)  # letters up to the end of each
        return int(np.diff(before.astype(np.int64), prepend=0).max())

    def spelling(self, token: int) -> str | None:
        """Return how an entry is spelt; None for an id that is none."""
        return str(self._spelt(token), "utf-8") if 0 <= token < len(self) else None

    def token(self, spelling: str) -> int | None:
        """Return the id of the entry that is spelt so; None where there is none."""
        wanted = spelling.encode("utf-8", "surrogatepass")
        place = bisect_left(self._order, wanted, key=lambda token: bytes(self._spelt(token)))
        if place == len(self._order):
            return None
        token: int = self._order[place]
        return token if self._spelt(token) == wanted else None

    def letter(self, letter: str) -> int | None:
        """Return the id of the entry of one letter; None where there is none."""
        code = ord(letter)
        place = bisect_left(self._letters, code)
        found = place < len(self._letters) and self._letters[place] == code
        return self._letter_ids[place] if found else None

    def merge(self, left: int, right: int) -> tuple[int, int] | None:
        """Return rank and id of what two entries become; None where they do not."""
        key = left << 32 | right
        place = bisect_left(self._pairs, key)
        if place == len(self._pairs) or self._pairs[place] != key:
            return None
        return divmod(self._merges[place], 1 << 32)

    def _spelt(self, token: int) -> memoryview:
        return self._spellings[self._ends[token - 1] if token else 0 : self._ends[token]]


def _header(view: memoryview, where: str) -> bytes:
    first = BytesIO(view[: MAX_JSON_BYTES + LENGTH.size])
    return KIND.read(BufferedReader(first), len(view), where)


def _numbers(content: Columns, name: str) -> memoryview:
    column = getattr(content, name)
    return memoryview(column.astype(column.dtype.newbyteorder("="), copy=False))


def _check(content: Columns, rules: Rules, where: str) -> None:
    """Raise `ArtifactError` for numbers that lead out of the columns, or cannot be searched."""
    entries = len(content.ends)
    right = {
        "ends": _ends_fit(content.ends, content.spellings),
        "order": len(content.order) == entries
        and _below(content.order, entries)
        and bool((np.bincount(content.order, minlength=entries) == 1).all()),
        "pairs": _ascends(content.pairs),
        "merges": len(content.merges) == len(content.pairs)
        and _below(content.merges & np.uint64(0xFFFFFFFF), entries),
        "joined": _ascends(content.joined),
        "letters": _ascends(content.letters) and len(content.letters) == len(content.letter_ids),
        "letter_ids": _below(content.letter_ids, entries),
        "added": _ascends(content.added) and _below(content.added, entries),
        "special": _ascends(content.special) and _below(content.special, entries),
        # One letter for another, or none: places in a text stay what they are.
        "rules": len(rules.replaced) == len(rules.replacement) <= 1
        and bool(rules.shown)
        and all(each < entries for each in (*rules.before, *rules.after)),
    }
    for name, fits in right.items():
        if not fits:
            raise ArtifactError(f"{where}: its {name} cannot be. {KIND.advice}")


def _ends_fit(ends: NDArray[np.uint32], spellings: NDArray[np.uint8]) -> bool:
    """Whether the spellings lie one behind the other, each of them UTF-8."""
    if int(ends[-1]) != len(spellings) or not bool((ends[:-1] <= ends[1:]).all()):
        return False
    try:
        str(spellings.data, "utf-8")
    except UnicodeDecodeError:
        return False
    starts = ends[:-1][ends[:-1] < len(spellings)]
    return bool((spellings[starts] & 0xC0 != 0x80).all())  # none starts amid a letter


def _ascends(column: NDArray[Any]) -> bool:
    return bool((column[:-1] < column[1:]).all())


def _below(column: NDArray[Any], limit: int) -> bool:
    return not len(column) or int(column.max()) < limit
