"""An exporter that exports nothing, for tests of who calls it and when."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_memllm_export.staging import Staging
from support.small_model import write_small_artifact


@dataclass
class FakeExporter:
    """Makes one and the same small artifact of anything; `made` are the sources it was given."""

    made: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)
    fail: Exception | None = None

    def __call__(
        self, source: Path, out: Path, *, overwrite: bool, progress: Any, **options: Any
    ) -> None:
        self.made.append((source, options))
        progress("table", 0, 1)
        with Staging(out, overwrite=overwrite) as staging:
            staging.path.rmdir()  # what writes the artifact makes its folder
            write_small_artifact(staging.path)
            if self.fail is not None:
                raise self.fail
            staging.publish()
