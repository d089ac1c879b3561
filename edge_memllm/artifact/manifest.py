"""The manifest: what an artifact holds, as dataclasses and as canonical JSON, strict both ways.

It checks every value against the others, so code that holds a `Manifest` need not check again.
It knows nothing of folders or files: `artifact.py` compares it with what is there.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Literal, TypeAlias, get_args

from edge_memllm.artifact.layout import ALIGNMENTS, TableLayout
from edge_memllm.artifact.model_spec import (
    MAX_VOCABULARY,
    ModelSpec,
    field_names,
    parse_earlier_model,
    parse_model,
)
from edge_memllm.artifact.sections import named_layout
from edge_memllm.artifact.strict_json import exact_fields, parse_json_object
from edge_memllm.codecs import EMBEDDING_DTYPES, PLAIN_CODECS, embedding_form
from edge_memllm.codecs.layered import MOST_CLASSES, TokenClass
from edge_memllm.codecs.wire import Wire
from edge_memllm.errors import ArtifactError, CorruptionError

MANIFEST_NAME = "manifest.json"
FORMAT = "edge-memllm"
FORMAT_VERSION = 3
UniformWeights: TypeAlias = Literal["int2", "int4", "int8", "fp16", "fp32"]
UNIFORM_WEIGHTS: tuple[UniformWeights, ...] = get_args(UniformWeights)
# mixed: matrices have codes of several widths; the graph says which
GRAPH_WEIGHTS = (*UNIFORM_WEIGHTS, "mixed")
# a processor repacks matrices of these
QUANTISED_WEIGHTS = tuple(each for each in GRAPH_WEIGHTS if each not in ("fp16", "fp32"))
KVDtype: TypeAlias = Literal["float16", "float32", "int8"]
KV_DTYPES: tuple[KVDtype, ...] = get_args(KVDtype)

_DIGEST = re.compile(r"[0-9a-f]{64}")
_UNSEALED = "0" * 64
_CODEC = re.compile(r"[a-z0-9-]{1,100}")
_PRODUCER = re.compile(r"[ -~]{1,200}")
# A plain file name on every system: no separator, drive, NUL, leading or trailing dot.
_FILE_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,198}[A-Za-z0-9_-])?")
_A_FILE_NAME = "a plain file name (letters, digits, '.', '_' and '-', no leading dot, no folder)"

_PARTS = ("model", "table", "graph", "files", "producer")
_EMBEDDING_CODEC = "embedding_codec"
_MAX_FILE_BYTES = 1 << 60
# Tokenizer, chat template and the like together; those of 250,000 tokens have some 40 MB.
_MAX_TEXT_BYTES = 1 << 28


@dataclass(frozen=True, slots=True)
class TableSpec:
    """The table file: how its records are laid out and where they start."""

    file: str
    codec: str
    embedding_dtype: str  # of what the graph is fed
    embedding_codec: str
    record_bytes: int
    stride: int
    alignment: int
    records_offset: int
    checksums_sha256: str
    parameters_sha256: str | None  # of the codec's parameters, if it has some
    classes: tuple[TokenClass, ...] | None  # whose records differ in form, if any do


@dataclass(frozen=True, slots=True)
class GraphSpec:
    """The graph file: how its weights are stored and what it computes in."""

    file: str
    external_data: str | None
    weights: str
    compute_dtype: str
    kv_dtype: str  # of keys and values: the compute dtype, "float32" or "int8"
    wire: str
    opset: int


@dataclass(frozen=True, slots=True)
class FileSpec:
    """Size and sha256 digest of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything manifest.json says. `files` names every file of the artifact but itself."""

    model: ModelSpec
    table: TableSpec
    graph: GraphSpec
    files: dict[str, FileSpec]
    producer: str
    earlier: str | None = field(default=None, compare=False)  # fingerprint, of one written before

    @property
    def layout(self) -> TableLayout:
        """The layout of the table's records."""
        return named_layout(
            self.table.codec,
            self.table.classes,
            layers=self.model.memory.layers,
            width=self.model.memory.width,
            embedding=embedding_form(
                self.model.hidden_size, self.table.embedding_dtype, self.table.embedding_codec
            ),
            alignment=self.table.alignment,
        )

    @property
    def fingerprint(self) -> str:
        """What names this content to sessions: sha256 of its canonical JSON, without `sha256`.

        Of a manifest of version 1 or 2 it is that of version 2, as it was when they were written;
        of one of version 3 that leaves unsaid what was added later, that of its own content.
        """
        if self.earlier is not None:
            return self.earlier
        return hashlib.sha256(_canonical(self._content())).hexdigest()

    def to_json(self) -> bytes:
        """Return the canonical JSON. Raises `ArtifactError` for what `from_json` would refuse."""
        data = sealed(self._content())
        Manifest.from_json(data, MANIFEST_NAME)
        return data

    def as_dict(self) -> dict[str, object]:
        """Return the parts as plain values, by their keys."""
        parts = asdict(self)
        return {name: parts[name] for name in _PARTS}

    def _content(self) -> dict[str, object]:
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **self.as_dict()}

    @classmethod
    def from_json(cls, data: bytes, where: str) -> Manifest:
        """Parse and check a manifest.

        Raises `CorruptionError` for one that was changed after it was written, `ArtifactError`
        for any other that cannot be; both name `where`.
        """
        content = parse_json_object(data, where)
        version = _check_version(content, where)
        seal = ("sha256",) if version > 2 else ()
        if seal:
            _check_seal(data, content.get("sha256"), where)
        if version == 1:
            _complete_version_1(content)
        parse = parse_model if version > 2 else parse_earlier_model
        top = exact_fields(content, where, ("format", "format_version", *seal, *_PARTS))
        manifest = cls(
            model=parse(content["model"], f"{where}: model"),
            table=_parse_table(content["table"], f"{where}: table", version),
            graph=_parse_graph(content["graph"], f"{where}: graph"),
            files=_parse_files(top.mapping("files"), f"{where}: files"),
            producer=top.text("producer", _PRODUCER, "a line of ASCII text"),
        )
        _check_table(manifest, f"{where}: table")
        _check_graph(manifest, f"{where}: graph")
        written = _digest_as_written(content)
        return manifest if written == manifest.fingerprint else replace(manifest, earlier=written)


def sealed(content: Mapping[str, object]) -> bytes:
    """Return the canonical JSON of a manifest's content, protected by its own digest.

    The digest is that of the bytes with 64 zeros in its place.
    """
    digest = hashlib.sha256(_canonical({**content, "sha256": _UNSEALED})).hexdigest()
    return _canonical({**content, "sha256": digest})


def _canonical(content: Mapping[str, object]) -> bytes:
    return (json.dumps(content, sort_keys=True, indent=2) + "\n").encode("ascii")


def _check_seal(data: bytes, digest: object, where: str) -> None:
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise ArtifactError(
            f"{where}: sha256 is missing or is not 64 hex digits. Export the model again."
        )
    # Spelt otherwise, or in two places, it would not be clear which bytes the digest is of.
    written = digest.encode("ascii")
    unsealed = data.replace(written, _UNSEALED.encode("ascii"))
    found = hashlib.sha256(unsealed).hexdigest()
    if data.count(written) != 1 or found != digest:
        raise CorruptionError(
            f"{where}: sha256 of its content is {found[:12]}, it says {digest[:12]}: the file was "
            "changed after it was written. Copy the folder again."
        )


def _digest_as_written(content: Mapping[str, object]) -> str:
    """Return the fingerprint of what was read, whatever this version would write instead."""
    content = {key: value for key, value in content.items() if key != "sha256"}
    content["format_version"] = 2 if content["format_version"] == 1 else content["format_version"]
    return hashlib.sha256(_canonical(content)).hexdigest()


def _check_version(content: dict[str, object], where: str) -> int:
    """Check the version before any other key, for each has its own; return it."""
    if content.get("format") != FORMAT:
        raise ArtifactError(f"{where}: this is not an {FORMAT} manifest (no format '{FORMAT}').")
    header = exact_fields(
        {"format_version": content.get("format_version")}, where, ["format_version"]
    )
    version = header.integer("format_version", 1, 1 << 31)
    if version > FORMAT_VERSION:
        raise ArtifactError(
            f"{where}: format_version is {version}, this reader supports 1 to {FORMAT_VERSION}. "
            "Upgrade edge-memllm or export the model again."
        )
    return version


def _complete_version_1(content: dict[str, object]) -> None:
    """Add what version 1 left unsaid: keys and values in the compute dtype, nothing shared."""
    model, graph, table = (content.get(part) for part in ("model", "graph", "table"))
    if isinstance(model, dict) and "num_hidden_layers" in model:
        rows = 0 if model.get("beta") == 8 else model["num_hidden_layers"]
        content["model"] = {"memory_layers": rows, **model}
    if isinstance(graph, dict) and "kv_dtype" not in graph and "compute_dtype" in graph:
        content["graph"] = {**graph, "kv_dtype": graph["compute_dtype"]}
    if isinstance(table, dict):
        content["table"] = {"parameters_sha256": None, "classes": None, **table}


def _names_embedding_codec(table: object) -> bool:
    """Whether a table's part says what the first ones of version 3 left unsaid."""
    return isinstance(table, dict) and _EMBEDDING_CODEC in table


def _parse_table(value: object, where: str, version: int) -> TableSpec:
    names = set(field_names(TableSpec))
    named = version > 2 and _names_embedding_codec(value)
    table = exact_fields(value, where, names if named else names - {_EMBEDDING_CODEC})
    dtype = table.choice("embedding_dtype", EMBEDDING_DTYPES)
    plain = PLAIN_CODECS[dtype]
    return TableSpec(
        file=table.text("file", _FILE_NAME, _A_FILE_NAME),
        codec=table.text("codec", _CODEC, "a codec id"),
        embedding_dtype=dtype,
        embedding_codec=table.text(_EMBEDDING_CODEC, _CODEC, "a codec id") if named else plain,
        record_bytes=table.integer("record_bytes", 1, _MAX_FILE_BYTES),
        stride=table.integer("stride", 1, _MAX_FILE_BYTES),
        alignment=table.integer("alignment", ALIGNMENTS[0], ALIGNMENTS[-1]),
        records_offset=table.integer("records_offset", 1, _MAX_FILE_BYTES),
        checksums_sha256=table.text("checksums_sha256", _DIGEST, "64 hex digits"),
        parameters_sha256=table.optional_text("parameters_sha256", _DIGEST, "64 hex digits"),
        classes=_parse_classes(table.optional_items("classes", MOST_CLASSES), f"{where}: classes"),
    )


def _parse_classes(items: list[object] | None, where: str) -> tuple[TokenClass, ...] | None:
    if items is None:
        return None
    classes = [exact_fields(item, where, field_names(TokenClass)) for item in items]
    return tuple(
        TokenClass(
            tokens=each.integer("tokens", 1, MAX_VOCABULARY),
            layers=each.texts("layers", _CODEC, "a codec id"),
        )
        for each in classes
    )


def _parse_graph(value: object, where: str) -> GraphSpec:
    graph = exact_fields(value, where, field_names(GraphSpec))
    return GraphSpec(
        file=graph.text("file", _FILE_NAME, _A_FILE_NAME),
        external_data=graph.optional_text("external_data", _FILE_NAME, _A_FILE_NAME),
        weights=graph.choice("weights", GRAPH_WEIGHTS),
        compute_dtype=graph.choice("compute_dtype", EMBEDDING_DTYPES),
        kv_dtype=graph.choice("kv_dtype", KV_DTYPES),
        wire=graph.choice("wire", get_args(Wire)),
        opset=graph.integer("opset", 1, 1000),
    )


def _parse_files(files: dict[str, object], where: str) -> dict[str, FileSpec]:
    parsed: dict[str, FileSpec] = {}
    folded = {MANIFEST_NAME}
    for name, value in files.items():
        if not _FILE_NAME.fullmatch(name):
            raise ArtifactError(f"{where}: found the name {name!a:.80}, expected {_A_FILE_NAME}.")
        if name.lower() in folded:
            raise ArtifactError(f"{where}: '{name}' is there already, case does not count.")
        folded.add(name.lower())
        spec = exact_fields(value, f"{where}: {name}", field_names(FileSpec))
        parsed[name] = FileSpec(
            bytes=spec.integer("bytes", 0, _MAX_FILE_BYTES),
            sha256=spec.text("sha256", _DIGEST, "64 hex digits"),
        )
    return parsed


def _check_table(manifest: Manifest, where: str) -> None:
    table = manifest.table
    try:
        layout = manifest.layout
    except (ArtifactError, ValueError) as error:
        raise ArtifactError(f"{where}: {error}") from None
    if table.classes is not None:
        tokens = sum(each.tokens for each in table.classes)
        _expect_equal(where, "the number of tokens", tokens, manifest.model.vocab_size)
    if (table.parameters_sha256 is None) != (layout.parameters_bytes == 0):
        raise ArtifactError(
            f"{where}: parameters_sha256 is {table.parameters_sha256!r}, codec {table.codec} has "
            f"{layout.parameters_bytes} bytes of parameters. Export the model again."
        )
    _expect_equal(where, "record_bytes", table.record_bytes, layout.record_bytes)
    _expect_equal(where, "stride", table.stride, layout.stride)
    page = max(4096, table.alignment)
    if table.records_offset % page:
        raise ArtifactError(
            f"{where}: records_offset is {table.records_offset}, expected a multiple of {page}."
        )
    size = table.records_offset + layout.table_bytes(manifest.model.vocab_size)
    found = _listed(manifest, table.file, where).bytes
    _expect_equal(where, f"the size of {table.file}", found, size)


def _check_graph(manifest: Manifest, where: str) -> None:
    graph = manifest.graph
    wire = manifest.layout.wire
    if graph.wire != wire:
        raise ArtifactError(
            f"{where}: wire is '{graph.wire}', expected '{wire}' for codec "
            f"{manifest.table.codec}. Graph and table are from different exports."
        )
    kv_dtypes = dict.fromkeys((graph.compute_dtype, "float32", "int8"))
    if graph.kv_dtype not in kv_dtypes:
        raise ArtifactError(
            f"{where}: kv_dtype is '{graph.kv_dtype}', expected {' or '.join(kv_dtypes)}."
        )
    names = [name for name in (graph.file, graph.external_data) if name is not None]
    for name in names:
        _listed(manifest, name, where)
    if len({manifest.table.file, *names}) != 1 + len(names):
        raise ArtifactError(f"{where}: table, graph and external data must be different files.")
    others = manifest.files.keys() - {manifest.table.file, *names}
    size = sum(manifest.files[name].bytes for name in others)
    if size > _MAX_TEXT_BYTES:
        raise ArtifactError(
            f"{where}: the files besides table and graph have {size} bytes, expected at most "
            f"{_MAX_TEXT_BYTES} together."
        )


def _listed(manifest: Manifest, name: str, where: str) -> FileSpec:
    if name not in manifest.files:
        raise ArtifactError(f"{where}: '{name}' is not listed under files.")
    return manifest.files[name]


def _expect_equal(where: str, what: str, found: int, expected: int) -> None:
    if found != expected:
        raise ArtifactError(
            f"{where}: {what} is {found}, expected {expected} for this model and codec. "
            "Export the model again."
        )
