"""The overlays of one loaded model, by name, and the record source for any choice of them.

Thread-safe: a generation keeps the source it was given, whatever is added or removed meanwhile.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from edge_memllm.artifact.manifest import Manifest
from edge_memllm.errors import RequestError
from edge_memllm.overlays.overlay import Overlay
from edge_memllm.overlays.table import OverlaidTable
from edge_memllm.process.forking import ProcessLock
from edge_memllm.table.source import RecordSource

# Choices whose composed rows are kept: each holds up to CACHE_BYTES.
MOST_CHOICES = 4


class Selection(NamedTuple):
    """What one generation uses."""

    source: RecordSource
    names: tuple[str, ...]
    overlays: tuple[Overlay, ...] = ()
    memory_gain: tuple[float, ...] | None = None  # one per layer, None for the model's own


class OverlaySet:
    """Holds the overlays over one table, in the order in which they came."""

    def __init__(self, table: RecordSource, manifest: Manifest) -> None:
        self._table = table
        self._manifest = manifest
        self._overlays: dict[str, Overlay] = {}
        self._sources: OrderedDict[tuple[str, ...], OverlaidTable] = OrderedDict()
        self._lock = ProcessLock()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all overlays, in their order."""
        return tuple(self._overlays)

    def add(self, overlay: Overlay) -> str:
        """Take in an overlay, behind the others; return its name.

        Raises `RequestError` when it is for another model, or its name is taken.
        """
        overlay.check_fits(self._manifest)
        with self._lock:
            if overlay.name in self._overlays:
                raise RequestError(
                    f"{overlay.where}: an overlay named '{overlay.name}' is loaded already. Remove "
                    "it, or give this one another name."
                )
            # A new dict, so that names can be read without the lock.
            self._overlays = {**self._overlays, overlay.name: overlay}
        return overlay.name

    def remove(self, name: str) -> None:
        """Let go of an overlay. Raises `RequestError` for a name that is not there."""
        with self._lock:
            self._check_known([name])
            self._overlays = {key: kept for key, kept in self._overlays.items() if key != name}
            for choice in [each for each in self._sources if name in each]:
                del self._sources[choice]

    def select(self, names: Sequence[str] | None) -> Selection:
        """Return the table with the named overlays over it, in their order; None means all.

        Raises `RequestError` for a name that is not there, or twice there.
        """
        with self._lock:
            chosen = tuple(self._overlays) if names is None else self._checked(names)
            overlays = tuple(self._overlays[name] for name in chosen)
            return Selection(self._source(chosen), chosen, overlays)

    def _source(self, chosen: tuple[str, ...]) -> RecordSource:
        if not chosen:
            return self._table
        found = self._sources.pop(chosen, None)
        if found is None:
            overlays = [self._overlays[name] for name in chosen]
            found = OverlaidTable(self._table, overlays, self._manifest.model.vocab_size)
        self._sources[chosen] = found  # the last used stands last
        while len(self._sources) > MOST_CHOICES:
            self._sources.popitem(last=False)
        return found

    def _checked(self, names: Sequence[str]) -> tuple[str, ...]:
        if isinstance(names, str) or not isinstance(names, Iterable):
            raise RequestError(f"overlays is {names!r}, expected a list of names.")
        chosen = tuple(names)
        self._check_known(chosen)
        if len(set(chosen)) < len(chosen):
            raise RequestError(f"overlays is {list(chosen)}, expected every name once.")
        return chosen

    def _check_known(self, names: Iterable[str]) -> None:
        unknown = [name for name in names if name not in self._overlays]
        if unknown:
            there = ", ".join(self._overlays) or "none"
            raise RequestError(f"There is no overlay {unknown[0]!r}. Loaded: {there}.")
