"""Whether the rows of one artifact mean the same in another, so that an overlay can carry them."""

from __future__ import annotations

from dataclasses import asdict

from edge_memllm.artifact.folder import Artifact
from edge_memllm.errors import RequestError
from edge_memllm.text import TOKENIZER_FILE

_SHAPE = ("architecture", "memory.kind", "memory.layers", "memory.width", "vocab_size")


def check_same_shape(base: Artifact, other: Artifact) -> None:
    """Raise `RequestError` unless rows of one can stand in the other, token for token."""
    ours, theirs = _facts(base), _facts(other)
    for name in _SHAPE:
        _expect_equal(base, other, name, ours[name], theirs[name])
    digests = [_digest(each, TOKENIZER_FILE) for each in (base, other)]
    if digests[0] != digests[1]:
        raise RequestError(
            f"{other.path}: {TOKENIZER_FILE} is not that of {base.path}, so a token id does not "
            "mean the same. Use models with one tokenizer."
        )


def check_same_but_rows(base: Artifact, changed: Artifact, *, tolerance: float) -> None:
    """Raise `RequestError` naming what differs between two artifacts besides rows.

    Embeddings are left to whoever reads the records.
    """
    check_same_shape(base, changed)
    ours, theirs = _facts(base), _facts(changed)
    for name in sorted(ours.keys() - {"identity"}):
        _expect_equal(base, changed, name, ours[name], theirs[name])
    codecs = [each.manifest.table.codec for each in (base, changed)]
    if codecs[0] != codecs[1] and not tolerance:
        raise RequestError(
            f"The table of {base.path} is stored as {codecs[0]}, that of {changed.path} as "
            f"{codecs[1]}: rounding alone makes their rows differ. Export both alike, or give a "
            "tolerance."
        )
    if _graph(base) != _graph(changed):
        raise RequestError(
            f"The graphs of {base.path} and {changed.path} differ, and overlays change memory rows "
            "only. Export both with the same options and version; attention and head must be "
            "those of the base model. Weights that were calibrated differ with the rows: compare "
            "the checkpoints instead."
        )


def _facts(artifact: Artifact) -> dict[str, object]:
    """Return what the manifest says of the model, value by value."""
    facts: dict[str, object] = {}
    for name, value in asdict(artifact.manifest.model).items():
        parts = value if isinstance(value, dict) else {"": value}
        facts |= {f"{name}.{part}".rstrip("."): inside for part, inside in parts.items()}
    return facts


def _graph(artifact: Artifact) -> tuple[bytes, str | None]:
    """Return what a graph is, without the model's identity in it."""
    spec = artifact.manifest.graph
    identity = artifact.manifest.model.identity.encode()
    data = artifact.read_bytes(spec.file).replace(identity, b"")
    return data, None if spec.external_data is None else _digest(artifact, spec.external_data)


def _digest(artifact: Artifact, name: str) -> str | None:
    spec = artifact.manifest.files.get(name)
    return None if spec is None else spec.sha256


def _expect_equal(base: Artifact, other: Artifact, name: str, ours: object, theirs: object) -> None:
    if ours != theirs:
        raise RequestError(
            f"{other.path}: {name} is {theirs}, that of {base.path} is {ours}. Overlays change "
            "memory rows only."
        )
