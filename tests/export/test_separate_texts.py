"""What judges an export is never what it was fitted to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edge_memllm.errors import ExportError
from edge_memllm.mixed_precision import Target
from edge_memllm_export import export_model
from edge_memllm_export.texts import check_separate, fitting_text, judging_text
from support.checkpoints import MakeCheckpoint, files_of

FITTED: dict[str, Any] = {"table_target": Target(bits=4), "kv_dtype": "int8"}
OTHER = "A text of other words, by which the same artifact is judged. " * 5


def test_nothing_in_an_artifact_comes_from_the_text_that_judges_it(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """Bits planned, keys and values and matrices calibrated: another judge, the same bytes."""
    for name, text in (("one", None), ("other", OTHER)):
        export_model(
            make_checkpoint(beta=3), tmp_path / name, quality_text=text, verify=False, **FITTED
        )
    assert files_of(tmp_path / "one") == files_of(tmp_path / "other")


def test_the_texts_that_come_along_share_nothing() -> None:
    fitted, judged = fitting_text(), judging_text()
    assert len(fitted) > 30_000
    shared = {judged[i : i + 40] for i in range(len(judged) - 40)}
    assert not any(fitted[i : i + 40] in shared for i in range(len(fitted)))


@pytest.mark.parametrize("name", ["table_text", "calibration_text"])
def test_one_text_for_both_is_refused(
    name: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    text = {name: OTHER, "quality_text": OTHER}
    with pytest.raises(ExportError, match=rf"quality text: it is the {name.replace('_', ' ')}, or"):
        export_model(make_checkpoint(beta=3), tmp_path / "out", **FITTED, **text)
    with pytest.raises(ExportError, match="would judge what was fitted to it"):
        export_model(make_checkpoint(beta=3), tmp_path / "out", **FITTED, **{name: judging_text()})


def test_a_part_is_enough_and_a_line_is_not() -> None:
    lines = [
        f"A line of some length, by which a text is known: it is number {n}." for n in range(99)
    ]
    with pytest.raises(ExportError, match="has parts of it"):
        check_separate("\n".join(lines), {"table text": "\n".join(["Others.", *lines[40:60]])})
    check_separate("\n".join(lines), {"table text": "\n".join(["Others.", lines[3]])})


def test_keys_and_values_are_calibrated_on_the_calibration_text(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """Also where matrices are not calibrated."""
    made = []
    for text in (None, OTHER):
        out = tmp_path / str(len(made))
        export_model(
            make_checkpoint(),
            out,
            graph_weights="int8",
            kv_dtype="int8",
            calibration_text=text,
            verify=False,
        )
        made.append((out / "graph.onnx").read_bytes())
    assert made[0] != made[1]
