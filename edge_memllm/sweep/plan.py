"""What a sweep is to measure, checked before anything is made; and the settings of a result.

Two results belong on one page only if they were measured alike: `Plan.settings` holds all that
their figures depend on, files by their digests.
"""

from __future__ import annotations

import hashlib
import json
from argparse import ArgumentTypeError
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import edge_memllm
from edge_memllm.artifact.atomic import FolderLock, not_written, write_whole
from edge_memllm.artifact.folder import Artifact
from edge_memllm.artifact.manifest import Manifest, UniformWeights
from edge_memllm.codecs import FAITHFUL, codec_id, get_codec
from edge_memllm.errors import ArtifactError, ExportError, RequestError
from edge_memllm.evaluation import Task
from edge_memllm.evaluation.perplexity import Windows, check_windows
from edge_memllm.mixed_precision import Sizing, target_of
from edge_memllm.options import Device, Option, positive_int

MEASURED = "what is measured"  # a heading of the command line
_FOLDER = "results"


def codec_words(text: str) -> tuple[str, ...]:
    """Parse words with commas between them."""
    found = tuple(word.strip() for word in text.split(","))
    if not all(found):
        raise ArgumentTypeError(f"{text!r} has an empty name between its commas")
    return found


@dataclass(frozen=True)
class SweepRequest:
    """What is asked for. `source` is an artifact, or a checkpoint that is exported first."""

    source: Annotated[Path, Option("an artifact or a checkpoint")]
    out: Annotated[Path, Option("where everything is written", metavar="DIR", flag="--out")]
    codecs: Annotated[
        tuple[str, ...],
        Option(
            "the table codecs to compare; docs/codecs.md lists them, and mixed-4.5 is mixed "
            "precision with that many bits per value",
            metavar="CODEC[,...]",
            parse=codec_words,
            several="list",
            flag="--codecs",
        ),
    ]
    _: KW_ONLY
    search: Annotated[
        bool, Option("try several scales for each group of values, with codecs that can")
    ] = False
    table_text: Annotated[
        str | None,
        Option(
            "text that codecs which learn count tokens in and mixed precision is tuned on; not one "
            "of --text",
            reads_text=True,
            unset="all tokens once; for mixed precision, prose that comes along",
        ),
    ] = None
    graph_weights: Annotated[
        UniformWeights | None,
        Option(
            "of the artifact that is made of a checkpoint",
            unset="int8, so that the table is judged and not the graph",
        ),
    ] = None
    keep: Annotated[bool, Option("keep the artifact of each codec")] = False
    redo: Annotated[bool, Option("measure again what has other settings than these")] = False
    reference: Annotated[
        Path | None,
        Option(
            "what predictions are compared with",
            metavar="ARTIFACT",
            unset="SOURCE",
            group=MEASURED,
            needs=("--text",),
        ),
    ] = None
    device: Annotated[Device, Option("where the graph runs", group=MEASURED)] = "auto"
    threads: Annotated[
        int | None, Option("threads of the graph on a CPU", parse=positive_int, group=MEASURED)
    ] = None
    texts: Mapping[str, str] = field(default_factory=dict)  # by name
    tasks: tuple[Task, ...] = ()
    context: int | None = None  # of the windows of texts
    stride: int | None = None


@dataclass(frozen=True)
class Plan:
    """A request whose parts exist and fit together. `codecs` are ids or mixed-<bits>, each once."""

    request: SweepRequest
    source: Path  # an artifact
    reference: Path  # an artifact
    codecs: tuple[str, ...]
    source_codec: str
    settings: dict[str, Any]

    @property
    def windows(self) -> Windows:
        """The windows of perplexity, as keywords."""
        return {"context": self.settings["context"], "stride": self.settings["stride"]}


def make_plan(request: SweepRequest, source: Path) -> Plan:
    """Check a request whose source is, or has become, the artifact `source`.

    Raises `RequestError` for codecs that do not exist, do not fit or are named twice, a dense
    model, a source that is quantised already, or windows that cannot be.
    """
    reference = source if request.reference is None else request.reference
    manifest, digest = _manifest(source)
    codecs = _codecs(request.codecs, manifest)
    most = manifest.model.max_position_embeddings
    context, stride = check_windows(request.context, request.stride, most)
    settings = {
        "version": edge_memllm.__version__,
        "source": digest,
        "reference": _manifest(reference)[1],
        "texts": {name: _digest(text.encode()) for name, text in request.texts.items()},
        "tasks": {task.name: _digest(repr(task).encode()) for task in request.tasks},
        "context": context,
        "stride": stride,
        "search": request.search,
        "table_text": None if request.table_text is None else _digest(request.table_text.encode()),
        "device": request.device,
        "threads": request.threads,
    }
    return Plan(request, source, reference, codecs, manifest.table.codec, settings)


def _manifest(path: Path) -> tuple[Manifest, str]:
    """Return an artifact's manifest and a digest of it, which covers every file."""
    with Artifact.open(path) as artifact:
        return artifact.manifest, artifact.manifest.fingerprint


def _codecs(words: tuple[str, ...], manifest: Manifest) -> tuple[str, ...]:
    layout, found = manifest.layout, manifest.table.codec
    if layout.layers == 0:
        raise RequestError(
            "A model without token memory (dense) has no memory rows: there is nothing to sweep."
        )
    if found not in FAITHFUL:
        raise RequestError(
            f"The source's table is stored as {found}: its error would be in every codec's rows. "
            "Give an artifact with an f16 or f32 table, or the checkpoint."
        )
    ids: list[str] = []
    for word in words:
        chosen = _codec(word, manifest)
        if chosen in ids:
            raise RequestError(f"Codec {chosen} is named twice. Name it once.")
        ids.append(chosen)
    if not ids:
        raise RequestError("There is no codec to measure. Name at least one.")
    return tuple(ids)


def _codec(word: str, manifest: Manifest) -> str:
    layout = manifest.layout
    if (target := target_of(word)) is not None:
        try:
            Sizing(target, layout, manifest.model.vocab_size).check()
        except ExportError as error:
            raise RequestError(f"{word}: {error}") from error
        return f"mixed-{target.bits:g}"
    try:
        chosen = codec_id(word, layout.width)
        layout.with_codec(get_codec(chosen))  # says whether it fits
    except ValueError as error:
        raise RequestError(f"{error}") from error
    return chosen


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class ResultsFolder:
    """DIR/results. Files appear by a rename; the bytes are on the disk before."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._path = out / _FOLDER

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder and hold it alone; the lock ends with the process, however it ends."""
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            lock = FolderLock(self._path.resolve())
        except OSError as error:
            raise not_written(self._path, error) from error
        with closing(lock):
            if lock.taken:
                raise RequestError(
                    f"{self._out}: another sweep is writing there. Wait for it, or choose another "
                    "folder."
                )
            yield

    def read(self, codec: str) -> dict[str, Any] | None:
        """Return a codec's result, None without one. Raises `ArtifactError` for a torn file."""
        path = self._path / f"{codec}.json"
        return _read(path) if path.exists() else None

    def write(self, codec: str, result: Mapping[str, Any]) -> None:
        """Store a codec's result in place of what there was."""
        write_whole(self._path / f"{codec}.json", _json(result))

    def all(self) -> dict[str, dict[str, Any]]:
        """Return every result by codec, in the order of their names."""
        return {path.stem: _read(path) for path in sorted(self._path.glob("*.json"))}


def load_results(out: Path) -> dict[str, Any]:
    """Return what the last sweep into `out` has put together, as `run_sweep` wrote it."""
    return _read(out / "results.json")


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Write results.json."""
    write_whole(path, _json(summary))


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Return the names of the settings in which two results differ."""
    names = dict.fromkeys([*expected, *found])
    return [name for name in names if found.get(name) != expected.get(name)]


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{path}: not a result of a sweep ({error}). Remove the file; it is measured again."
        ) from error
    if not isinstance(found, dict) or not isinstance(found.get("settings"), dict):
        raise ArtifactError(
            f"{path}: not a result of a sweep: it states no settings. Remove the file; it is "
            "measured again."
        )
    return found
