"""`load`: from the path of an artifact to a model, everything checked on the way.

First the memory is planned for a device, then everything is opened. A composition root: it may name
the outer layer, and imports it only when called.
"""

from __future__ import annotations

import logging
import os
from argparse import ArgumentTypeError
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from edge_memllm.artifact.folder import Artifact
from edge_memllm.artifact.manifest import Manifest
from edge_memllm.checked_values import is_integer, wrong_value
from edge_memllm.engine.feeding import PREFILL_CHUNKS
from edge_memllm.engine.request import check_positive
from edge_memllm.errors import EdgeMemLLMError, RequestError, RuntimeUnavailableError
from edge_memllm.memory_plan import (
    Choices,
    MemoryPlan,
    packs_by_itself,
    plan_memory,
)
from edge_memllm.model import Model
from edge_memllm.options import Device, Option, byte_size, called_with, positive_int
from edge_memllm.overlays import Overlay, open_overlay
from edge_memllm.overlays.table import CACHE_BYTES
from edge_memllm.process.memory_account import MemoryShare
from edge_memllm.progress import Progress
from edge_memllm.readers import ReaderName, reader_names
from edge_memllm.runtime_protocol import Runtime
from edge_memllm.statistics import give_back, process_memory
from edge_memllm.store import ExportPlan, artifact_of, home_folder, refuse
from edge_memllm.table.table import Quality, Table
from edge_memllm.text.tokenization import Tokenizer

_log = logging.getLogger(__name__)

# How far the estimate may be off before that is worth a warning, beyond the share.
_ESTIMATE_SHARE, _ESTIMATE_BYTES = 1.1, 16_000_000


AUTO = "auto"  # of packed_cache; a folder of that name is ./auto
_PACKED = "packed"  # the folder in the user's cache


def _packed_place(word: str) -> str | Path | None:
    return {AUTO: AUTO, "off": None}.get(word, Path(word))


@dataclass(frozen=True)
class LoadOptions:
    """What may be asked of `load`, which says what each of them does."""

    path: Annotated[
        str | os.PathLike[str],
        Option(
            "an exported model, or what to export one of first: the folder of a checkpoint, a "
            ".gguf file, org/name of the Hugging Face Hub; or a name that 'list' shows",
            metavar="MODEL",
            parse=Path,
        ),
    ]
    _: KW_ONLY
    device: Annotated[
        Device,
        Option(
            "where the graph runs; auto takes CUDA where it works, else the CPU, and says so",
        ),
    ] = "auto"
    reader: Annotated[
        ReaderName,
        Option(
            "how the table is read; ram loads it whole, auto measures the storage for a moment and "
            "chooses",
        ),
    ] = "auto"
    threads: Annotated[
        int | None,
        Option("threads of the graph on a CPU", parse=positive_int, unset="one per physical core"),
    ] = None
    prefill_chunk: Annotated[
        int | None,
        Option(
            "read the prompt N tokens at a time: less takes less memory",
            parse=positive_int,
            unset="{cpu}, on CUDA {cuda}".format(**PREFILL_CHUNKS),
        ),
    ] = None
    table_quality: Annotated[
        Quality,
        Option(
            "coarse reads only the front half of the records of a nested8 table: less to read, "
            "values of about 4 bits",
        ),
    ] = "full"
    record_cache: Annotated[
        int | str,
        Option(
            "keep records that were read in this much memory (default: %(default)s, leave it to "
            "the system's page cache)",
            parse=byte_size,
        ),
    ] = 0
    hot_text: Annotated[
        str | None,
        Option(
            "keep the records of this text's most frequent tokens for good, in at most half of the "
            "record cache",
            reads_text=True,
        ),
    ] = None
    memory_limit: Annotated[
        int | str | None,
        Option(
            "refuse what would need more memory than this, mapped files not counted: at once, or "
            "when a text grows too long (512MB, 1.5GiB)",
            parse=byte_size,
        ),
    ] = None
    vram_limit: Annotated[
        int | str | None, Option("the same for the memory of the GPU", parse=byte_size)
    ] = None
    cuda_graph: Annotated[bool, Option("on CUDA, record a decode step once and replay it")] = False
    packed_cache: Annotated[
        str | os.PathLike[str] | None,
        Option(
            "keep low-bit weights here as this CPU wants them: mapped from there they take no "
            "memory of the process; made on first use, 2.4 times the graph. auto keeps those of "
            "large graphs in the user's cache where there is room, off keeps none",
            metavar="DIR|auto|off",
            parse=_packed_place,
        ),
    ] = AUTO
    overlays: Annotated[
        Sequence[str | os.PathLike[str] | Overlay],
        Option(
            "change rows of chosen tokens by this overlay (see 'overlay'); may be repeated, each "
            "acts on what those before it made",
            flag="--overlay",
            parse=Path,
            several="repeated",
        ),
    ] = ()
    export: bool = False
    export_options: Mapping[str, Any] | None = None
    progress: Progress | None = None
    memory_share: MemoryShare | None = None


@called_with(LoadOptions)
def load(options: LoadOptions) -> Model:
    """Open the artifact in the folder `path` and return a model ready to generate.

    `path` may also name a model of the Hugging Face Hub, as `org/name` or
    `hf://org/name@revision`: its files are downloaded once, see docs/embedding.md.

    What is no artifact but the folder of a checkpoint, a GGUF file, or a model of the Hub that is
    one of these, is exported into the user's cache if `export` is true, with `export_options` of
    `edge_memllm_export.export_model` such as `{"graph_weights": "int8"}`; what is there already,
    and has not changed, is loaded in any case.

    `device` is "cpu", "cuda" or "auto" (CUDA where it really works); `reader` is one of
    `edge_memllm.readers.reader_names()`, of which "auto" takes the one that suits the storage.
    `threads` of the graph on a CPU, None for one per physical core; `prefill_chunk` tokens of a
    prompt are computed at a time, None chooses by device. `table_quality` "coarse" reads only the
    front part of each record, where the table's codec has one: fewer bytes, less exact.

    `record_cache` bytes keep records that were read; those of the most frequent tokens of
    `hot_text` for good, in at most half of it. `memory_limit` bounds the anonymous memory of the
    process, `vram_limit` that of a CUDA device, both in bytes: refused now if the estimate has no
    room for a first text, and later when a text grows beyond what fits. `packed_cache` is a
    folder that keeps weights as this CPU wants them, which takes them out of anonymous memory;
    "auto" takes one in the user's cache for large graphs, and goes without where that cannot be;
    None keeps nothing.
    `memory_share` is in place of a limit where several models of a process share one.
    `cuda_graph` records a decode step on CUDA and replays it.

    `overlays` are files (docs/overlays.md) that change rows of chosen tokens, in this order; a
    generation may choose among them. The table itself stays as it is.

    `progress(stage, done, total)` is called on the way, from this thread: the stages are "files"
    (bytes checked, but for graph and table), "graph" and "table" (0 of 1, then 1 of 1), before
    them those of an export; within "graph", `edge_memllm.progress.PACKING` where weights are
    packed to be kept, which may take minutes. What it raises ends the loading.

    What was chosen is in `Model.describe()` and is logged. Raises `ArtifactError` for a folder
    that cannot be used, `RuntimeUnavailableError` for a device or package that is not there,
    `RequestError` for an option that does not exist or cannot be met, `ExportError` for an export
    that is refused; nothing is left open then.
    """
    _check(options)
    laid_over = _open_overlays(options.overlays)
    folder = _artifact_folder(options)
    before = process_memory().anon_bytes  # an export has used some that the model does not take
    with ExitStack() as opened:
        # The runtime reads the graph and checks what it read: once is enough.
        artifact = opened.enter_context(Artifact.open(folder, options.progress, check_graph=False))
        for overlay in laid_over:
            overlay.check_fits(artifact.manifest)  # before the graph is loaded for nothing
        with _stage(options.progress, "graph"):
            plan, runtime = _planned_runtime(options, artifact, before)
            opened.callback(runtime.close)
        tokenizer = Tokenizer.from_artifact(artifact)
        with _stage(options.progress, "table"):
            table = _open_table(options, artifact, tokenizer)
            opened.callback(table.close)
        model = Model(
            artifact, table, runtime, tokenizer, prefill_chunk=options.prefill_chunk, memory=plan
        )
        for overlay in laid_over:
            model.add_overlay(overlay)
        opened.pop_all()
    _log.info("%s: %s on %s, reader %s", options.path, runtime.name, model.device, model.reader)
    if plan.packed_cache is not None:
        _log.info("%s: weights mapped from %s", options.path, plan.packed_cache)
    _compare(plan, before)
    return model


@called_with(LoadOptions)
def plan_loading(options: LoadOptions) -> tuple[Manifest, MemoryPlan]:
    """Return what an artifact is, and what it would take, without loading it.

    Where `device` is "auto" that is counted as on a CPU. Raises as `load` does.
    """
    from edge_memllm_runtimes import usable_devices

    _check(options)
    with Artifact.open(_artifact_folder(options), check_graph=False) as artifact:
        device = usable_devices(artifact, options.device)[-1]
        packed = _packed_folder(device, options, artifact)
        before = process_memory().anon_bytes
        return artifact.manifest, _plan(device, options, artifact, before, packed)


def _bytes(options: LoadOptions, name: str) -> int | None:
    """Return a size, which may be given as words such as "1GB". Raises `RequestError`."""
    value = getattr(options, name)
    if not isinstance(value, str):
        return value  # type: ignore[no-any-return]  # `_check` looks at it
    try:
        return byte_size(value)
    except ArgumentTypeError as error:
        raise RequestError(f"{name}: {error}.") from None


def _check(options: LoadOptions) -> None:
    """Raise `RequestError` for what can be seen to be wrong before anything is opened."""
    for name in ("prefill_chunk", "memory_limit", "vram_limit"):
        if (value := _bytes(options, name)) is not None:
            check_positive(name, value)
    if options.reader not in reader_names():
        raise RequestError(
            f"Unknown reader '{options.reader}', expected one of {', '.join(reader_names())}."
        )
    cache = _bytes(options, "record_cache")
    if not is_integer(cache) or cache < 0:
        raise wrong_value("record_cache", cache, "bytes, 0 for none")
    if options.export_options is not None and not options.export:
        raise RequestError("export_options are given, and export is not. Give export=True.")
    if options.memory_share is not None and options.memory_limit is not None:
        raise RequestError(
            "memory_limit and memory_share are both given: a share is part of another limit. Leave "
            "one of the two out."
        )
    if options.hot_text is not None and not cache:
        raise RequestError(
            "hot_text says what to keep in the record cache, and there is none. Give record_cache."
        )


def _artifact_folder(options: LoadOptions) -> Path:
    permit = _allow_export if options.export else refuse
    return artifact_of(options.path, options.export_options or {}, permit, options.progress)


def _allow_export(_: ExportPlan) -> None:
    """Let it be exported: that was asked for."""


def _open_overlays(overlays: Sequence[str | os.PathLike[str] | Overlay]) -> list[Overlay]:
    if isinstance(overlays, str | os.PathLike):
        raise RequestError(f"overlays is {overlays!r}, expected a list of files.")
    return [each if isinstance(each, Overlay) else open_overlay(each) for each in overlays]


def _planned_runtime(
    options: LoadOptions, artifact: Artifact, before: int | None
) -> tuple[MemoryPlan, Runtime]:
    """Plan the memory for a device and open the graph on it; the first device that works."""
    from edge_memllm_runtimes import usable_devices

    *first, last = usable_devices(artifact, options.device)
    for device in first:
        try:
            return _runtime_on(device, options, artifact, before)
        except RuntimeUnavailableError as error:
            _log.info("device auto: %s, because %s is not usable. %s", last, device, error)
    return _runtime_on(last, options, artifact, before)


def _runtime_on(
    device: str, options: LoadOptions, artifact: Artifact, before: int | None
) -> tuple[MemoryPlan, Runtime]:
    packed = _packed_folder(device, options, artifact)
    plan = _plan(device, options, artifact, before, packed)
    try:
        return plan, _opened(device, options, artifact, plan)
    except EdgeMemLLMError as error:
        if packed is None or options.packed_cache != AUTO:
            raise
        # Nobody asked for it, so nothing may fail for it; what is wrong with the artifact, loading
        # without it tells. It takes more memory without, so it is said.
        _log.warning("%s: no packed weights: %s", options.path, error)
    plan = _plan(device, options, artifact, before, None)
    return plan, _opened(device, options, artifact, plan)


def _packed_folder(device: str, options: LoadOptions, artifact: Artifact) -> Path | None:
    """Return the folder of packed weights, if there are to be some."""
    asked = options.packed_cache
    if asked != AUTO:
        return None if asked is None else Path(asked)
    if device != "cpu" or not packs_by_itself(artifact.manifest):
        return None
    try:
        return home_folder() / _PACKED
    except RequestError as error:  # no home
        _log.info("%s: no packed weights: %s", options.path, error)
        return None


def _opened(device: str, options: LoadOptions, artifact: Artifact, plan: MemoryPlan) -> Runtime:
    from edge_memllm_runtimes import open_runtime
    from edge_memllm_runtimes.options import RuntimeOptions

    wanted = RuntimeOptions(
        threads=options.threads,
        kv_bytes=plan.kv_bytes,
        score_bytes=plan.score_bytes,
        memory_share=options.memory_share,
        packed_cache=plan.packed_cache,
        packed_unasked=options.packed_cache == AUTO,
        arena_bytes=plan.arena_bytes,
        cuda_graph=options.cuda_graph,
        progress=options.progress,
    )
    return open_runtime(artifact, device, wanted)


def _plan(
    device: str, options: LoadOptions, artifact: Artifact, before: int | None, packed: Path | None
) -> MemoryPlan:
    """Plan what a model takes on a device; `before` is the anonymous memory that is in use now."""
    if device == "cpu" and options.vram_limit is not None:
        raise RequestError(
            "vram_limit is for CUDA, the device is 'cpu'. Leave it out or use device 'cuda'."
        )
    choices = Choices(
        options.prefill_chunk or PREFILL_CHUNKS[device],
        _bytes(options, "record_cache") or 0,
        options.reader,
        packed is not None,
        CACHE_BYTES if options.overlays else 0,
    )
    plan = plan_memory(
        artifact.manifest,
        device,
        choices,
        memory_limit=_bytes(options, "memory_limit"),
        vram_limit=_bytes(options, "vram_limit"),
        base_bytes=before,
    )
    return replace(plan, packed_cache=packed)


def _open_table(options: LoadOptions, artifact: Artifact, tokenizer: Tokenizer) -> Table:
    text = options.hot_text
    return Table.open(
        artifact,
        options.reader,
        record_cache_bytes=_bytes(options, "record_cache") or 0,
        hot_tokens=() if text is None else frequent_tokens(tokenizer, text),
        quality=options.table_quality,
    )


def frequent_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the distinct token ids of a text, the most frequent first."""
    return [token for token, _ in Counter(tokenizer.encode(text)).most_common()]


def _compare(plan: MemoryPlan, before: int | None) -> None:
    """Warn if more is resident now than was planned: a limit would be broken by as much."""
    give_back()  # what loading has freed is not in use
    now = process_memory().anon_bytes
    if before is None or now is None or plan.device_items:
        return
    found, estimate = now - before, plan.loaded_bytes
    _log.info("memory: loading took %s bytes, estimated %s", f"{found:,}", f"{estimate:,}")
    base = plan.items[0].bytes - before  # libraries may have come in as well
    if found > (estimate + max(0, base)) * _ESTIMATE_SHARE + _ESTIMATE_BYTES:
        _log.warning(
            "memory: loading took %s bytes, more than the %s estimated. A memory limit is "
            "exceeded by as much.",
            f"{found:,}",
            f"{estimate:,}",
        )


@contextmanager
def _stage(progress: Progress | None, name: str) -> Iterator[None]:
    """Tell that a stage begins, and that it is done."""
    tell = progress or (lambda *_: None)
    tell(name, 0, 1)
    yield
    tell(name, 1, 1)
